"""`SearchSpace`: which widths each group of sites may choose, and the genome that encodes a policy.

A genome is an int array `[groups, 2]`: for each group of sites an index into its weight widths and one
into its activation widths, both in ascending order. What a choice costs is `cost.py`.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hq_plugin.config import Config
from hq_plugin.errors import ConfigError, HQWarning, PolicyError
from hq_plugin.grouping import worthwhile_group_sizes
from hq_plugin.nn.saturation import may_clip
from hq_plugin.policy import ACTIVATION_BITS, FLOAT_BITS, LEFT_OUT, WEIGHT_BITS, HybridPolicy, LayerBits
from hq_plugin.sites import Site, SiteTable

Genome = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Sites that share their widths, and the widths among which they choose, ascending.

    Attributes:
        name: The group's name.
        sites: Its sites.
        weight_bits: Widths of weights.
        activation_bits: Widths of inputs.
        group_sizes: For each width of weights, how many inputs share a step where the site allows it; 0 for whole
            channels. None at all is 0 for every width.
        dynamic: Whether steps of inputs are computed when a layer runs.
    """

    name: str
    sites: tuple[Site, ...]
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    group_sizes: tuple[int, ...] = ()
    dynamic: bool = False

    def is_dynamic(self, site: Site) -> bool:
        """Whether steps of a site's input, where it is quantized, are computed for each row: in linear layers."""
        return self.dynamic and site.kind == "linear" and site.quantizes_input

    def group_size(self, site: Site, weight: int) -> int:
        """Returns how many inputs of a site share a step, for an index of a width: 0 where whole channels do."""
        size = self.group_sizes[weight] if self.group_sizes and self.weight_bits[weight] != LEFT_OUT else 0
        return size if size and site.takes_groups(size) else 0

    def bits(self, site: Site, weight: int, activation: int) -> LayerBits:
        """Returns a site's widths for two indices. A site without a float input keeps it."""
        activation_bits = self.activation_bits[activation] if site.quantizes_input else FLOAT_BITS
        dynamic = self.is_dynamic(site) and activation_bits != FLOAT_BITS
        return LayerBits(self.weight_bits[weight], activation_bits, self.group_size(site, weight), dynamic)


@dataclass(frozen=True)
class SearchSpace:
    """The choices at every group of sites of one model."""

    table: SiteTable
    groups: tuple[Group, ...]

    @classmethod
    def build(
        cls,
        table: SiteTable,
        config: Config,
        fused: Sequence[Sequence[str]] = (),
        weights: Mapping[str, Tensor] | None = None,
    ) -> SearchSpace:
        """Builds the space that `config` describes.

        Args:
            table: The model's sites.
            config: Gives widths (activations of None are 8 bits), pinned sites and groups. For ONNX Runtime, 8-bit
                weights of layers with 8-bit inputs become 7-bit ones, unless they are pinned.
            fused: Names of sites that share their widths as well; those that are no sites are passed over.
            weights: Float weights by name of the site, from which a choice of group sizes is made.

        Raises:
            ConfigError: A pattern matches no site, a site is in two groups, or a pinned width is not
                possible.
        """
        activation_bits = config.activation_bits or (8,)
        assert isinstance(activation_bits, tuple)
        table = _regroup(table, config.groups, fused)
        groups = []
        pinned_used: set[str] = set()
        for name, sites in table.groups.items():
            widths, activations = config.weight_bits, activation_bits
            if isinstance(config.embedding_bits, tuple) and all(site.kind == "embedding" for site in sites):
                left_out = all(site.may_be_left_out for site in sites)
                widths = tuple(bits for bits in config.embedding_bits if bits != LEFT_OUT or left_out)
                if not widths:
                    raise ConfigError(
                        f"embedding_bits={LEFT_OUT} leaves {name!r} no width: 0 bits are for blocks of columns "
                        "(embedding_columns). Add a width from 1 to 8."
                    )
            if config.target == "onnxruntime" and any(site.quantizes_input for site in sites):
                widths = _exactly_summed(widths, activations)
            pins = {
                pattern: _pin(pattern, width, activations)
                for pattern, width in (config.pinned or {}).items()
                if any(fnmatch.fnmatchcase(site.name, pattern) for site in sites)
            }
            pinned_used.update(pins)
            named = {site.name for site in sites}
            pins = {pattern: pin for pattern, pin in pins.items() if pattern in named} or pins
            if len(set(pins.values())) > 1:
                given = ", ".join(f"{pattern!r}: {(config.pinned or {})[pattern]}" for pattern in pins)
                raise ConfigError(
                    f"pinned gives {', '.join(site.name for site in sites)} different widths ({given}). Layers "
                    "that share a weight, or are in one list of groups, have the same."
                )
            widths, activations = next(iter(pins.values()), (widths, activations))
            if not any(site.quantizes_input for site in sites):
                activations = (FLOAT_BITS,)
            dynamic = config.activation_scheme == "dynamic"
            sizes = config.group_size or 0
            if isinstance(sizes, int):
                sizes = (sizes,) * len(widths)
            else:
                sizes = worthwhile_group_sizes(sites, weights or {}, widths, sizes)
            groups.append(Group(name, tuple(sites), widths, activations, sizes, dynamic))
        for pattern in set(config.pinned or {}) - pinned_used:
            raise ConfigError(f"pinned pattern {pattern!r} matches no site. Sites are: {_some(table)}.")
        size = config.group_size
        if isinstance(size, int) and size and not any(site.takes_groups(size) for site in table):
            warnings.warn(
                f"group_size={size} divides the inputs of no layer: every channel has one step. Give another size.",
                HQWarning,
                stacklevel=2,
            )
        return cls(table, tuple(groups))

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Every weight width that some group may choose, ascending."""
        return tuple(sorted({bits for group in self.groups for bits in group.weight_bits}))

    @property
    def activation_bits(self) -> tuple[int, ...]:
        """Every activation width that some group may choose, ascending."""
        return tuple(sorted({bits for group in self.groups for bits in group.activation_bits}))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a genome: `(groups, 2)`."""
        return len(self.groups), 2

    @property
    def top(self) -> Genome:
        """The largest index at each place of a genome, which is also the policy of most bits."""
        return np.array([[len(g.weight_bits) - 1, len(g.activation_bits) - 1] for g in self.groups])

    def policy(self, genome: Genome) -> HybridPolicy:
        """Decodes a genome; the policy lists the sites in the model's order."""
        chosen = {
            site.name: group.bits(site, int(weight), int(activation))
            for group, (weight, activation) in zip(self.groups, genome, strict=True)
            for site in group.sites
        }
        return HybridPolicy({site.name: chosen[site.name] for site in self.table})

    def genome(self, policy: HybridPolicy) -> Genome:
        """Encodes a policy.

        Raises:
            PolicyError: The policy is for another model, breaks a group, or uses a width that the
                space does not have.
        """
        check_sites(policy, [site.name for site in self.table])
        genome = np.zeros(self.shape, dtype=np.int64)
        for row, group in enumerate(self.groups):
            weights = {policy[site.name].weight for site in group.sites}
            activations = {policy[s.name].activation for s in group.sites if s.quantizes_input}
            for site in group.sites:
                dynamic = group.is_dynamic(site) and policy[site.name].activation != FLOAT_BITS
                if policy[site.name].dynamic != dynamic:
                    raise PolicyError(
                        f"The policy gives {site.name!r} {_scheme(policy[site.name].dynamic)} activations; this "
                        f"search space has {_scheme(dynamic)} ones."
                    )
            for column, (chosen, possible) in enumerate(
                ((weights, group.weight_bits), (activations or {FLOAT_BITS}, group.activation_bits))
            ):
                if len(chosen) > 1:
                    names = ", ".join(site.name for site in group.sites)
                    raise PolicyError(f"Sites {names} share one width, but the policy gives {chosen}.")
                width = chosen.pop()
                if width not in possible:
                    kind = ("weight", "activation")[column]
                    raise PolicyError(
                        f"The policy gives {group.name!r} a {kind} width of {width}; this search space "
                        f"has {possible}. Meta-train with {kind}_bits that include it."
                    )
                genome[row, column] = possible.index(width)
            for site in group.sites:
                size = group.group_size(site, int(genome[row, 0]))
                if policy[site.name].group_size != size:
                    raise PolicyError(
                        f"The policy gives {site.name!r} a group size of {policy[site.name].group_size}; this "
                        f"search space has {size} at {policy[site.name].weight} bits. Meta-train with the "
                        "group_size that it was made with."
                    )
        return genome

    def nearest_uniform(self, weight_bits: int, activation_bits: int) -> Genome:
        """Returns the genome of one width for all; a pinned group takes its nearest possible width."""
        return np.array(
            [
                [_nearest(group.weight_bits, weight_bits), _nearest(group.activation_bits, activation_bits)]
                for group in self.groups
            ]
        )


def check_sites(policy: HybridPolicy, names: list[str]) -> None:
    """Checks that a policy names exactly the sites of a model.

    Raises:
        PolicyError: A site is missing or unknown.
    """
    missing = [name for name in names if name not in policy]
    unknown = [name for name in policy if name not in names]
    if missing or unknown:
        parts = [f"it lacks {', '.join(missing[:5])}"] if missing else []
        parts += [f"it names {', '.join(unknown[:5])}, which the model does not have"] if unknown else []
        raise PolicyError(
            f"The policy is for another model: {'; '.join(parts)}. Give a width for each of the model's "
            f"{len(names)} sites."
        )


def _regroup(table: SiteTable, groups: tuple[tuple[str, ...], ...], fused: Sequence[Sequence[str]]) -> SiteTable:
    """Joins the sites of each list of patterns and of each list of names, and all that are tied to them."""
    joined = {site.group: site.group for site in table}
    taken: dict[str, int] = {}
    for number, patterns in enumerate(groups):
        members: list[str] = []
        for pattern in patterns:
            matching = [site.group for site in table if fnmatch.fnmatchcase(site.name, pattern)]
            if not matching:
                raise ConfigError(f"groups pattern {pattern!r} matches no site. Sites are: {_some(table)}.")
            members += matching
        for member in members:
            if taken.setdefault(member, number) != number:
                raise ConfigError(f"Site {member!r} is in two lists of groups; join them into one.")
            joined[member] = members[0]
    for names in fused:
        found = [joined[table[name].group] for name in names if name in table]
        joined = {group: found[0] if leader in found else leader for group, leader in joined.items()}
    return replace(table, sites=tuple(replace(site, group=joined[site.group]) for site in table))


def _exactly_summed(widths: tuple[int, ...], activations: tuple[int, ...]) -> tuple[int, ...]:
    """Returns widths of weights whose products with integer inputs every processor sums exactly: 7 in place of 8.

    ONNX Runtime multiplies both as 8-bit integers, and clips large sums on x86 without VNNI.
    """
    widest = max((bits for bits in activations if bits != FLOAT_BITS), default=0)
    narrowed = {next(bits for bits in range(width, 0, -1) if not may_clip(bits, widest)) for width in widths}
    return tuple(sorted(narrowed))


def _pin(
    pattern: str, width: int | tuple[int, int], activations: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pair: tuple[Any, ...] = tuple(width) if isinstance(width, (tuple, list)) else (width, None)
    possible = len(pair) == 2 and pair[0] in WEIGHT_BITS and pair[1] in (None, *ACTIVATION_BITS)
    if not possible:
        raise ConfigError(
            f"pinned[{pattern!r}]={width!r} is not possible: give a weight width of 1 to 8, or a pair "
            f"with an activation width of 2 to 8 or {FLOAT_BITS} for floating point."
        )
    weight, activation = pair
    return (weight,), activations if activation is None else (activation,)


def _scheme(dynamic: bool) -> str:
    return "dynamic" if dynamic else "static"


def _nearest(widths: tuple[int, ...], wanted: int) -> int:
    """Returns the index of the largest width not above `wanted`, or the smallest there is."""
    below = [index for index, width in enumerate(widths) if width <= wanted]
    return below[-1] if below else 0


def _some(table: SiteTable) -> str:
    names = [site.name for site in table]
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
