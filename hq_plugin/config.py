"""`Config`: every option of `quantize` and `meta_train`, with its default and its meaning."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from torch import Tensor

from hq_plugin.errors import ConfigError
from hq_plugin.policy import ACTIVATION_BITS, LEFT_OUT, WEIGHT_BITS
from hq_plugin.untrusted import check_types

Effort = Literal["smoke", "fast", "balanced", "best"]
BlockKind = Literal["auto", "dense", "low_rank", "table"]
LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Steps:
    """How much work an effort stands for.

    Attributes:
        meta: Optimizer steps of meta-training.
        evaluations: Policies that the search scores.
        finetune: Optimizer steps of fine-tuning.
        holdout: Most samples on which candidates are scored; leaders are re-ranked on four times as many.
        recalibration: Training samples on which BatchNorm statistics are re-estimated for a candidate.
        batch: Samples a batch where `data` is a Dataset.
    """

    meta: int
    evaluations: int
    finetune: int
    holdout: int
    recalibration: int = 32
    batch: int = 64


EFFORTS: dict[str, Steps] = {
    "smoke": Steps(meta=6, evaluations=12, finetune=4, holdout=16, recalibration=8, batch=8),
    "fast": Steps(meta=100, evaluations=150, finetune=400, holdout=256),
    "balanced": Steps(meta=500, evaluations=400, finetune=2000, holdout=512),
    "best": Steps(meta=2000, evaluations=1200, finetune=8000, holdout=1024),
}


#: Weight widths that each target runs fast; `"storage"` only counts bytes.
TARGETS: dict[str, tuple[int, ...]] = {
    "storage": tuple(WEIGHT_BITS),
    "torch": (1, 2, 3, 4, 8),
    "onnxruntime": (2, 4, 7, 8),
}

#: What options that are None become, unless an integration proposes something else.
DEFAULTS: dict[str, Any] = {
    "group_size": 0,
    "embedding_parts": 1,
    "embedding_columns": 1,
    "activation_scheme": "static",
    "sensitivities": "both",
    "train_float": True,
    "block_loss": 4.0,
    "temperature": 2.0,
    "calibration_batches": 4,
    "self_written": 0.0,
}


@dataclass(frozen=True)
class Config:
    """Options of `hq_plugin.quantize` and `hq_plugin.meta_train`. Any field may be given as a keyword.

    Attributes:
        effort: `"smoke"` (a handful of steps and samples, sensitivities of the narrowest width alone: to see
            that it runs), `"fast"`, `"balanced"` or `"best"`; sets the step counts below that are None.
        seed: Seeds sampling of policies, data order, the search and the MetaQuantNet's initialisation.
        target: What the model is for: `"storage"`, `"torch"` or `"onnxruntime"`; of `weight_bits` only the
            widths remain that it runs fast, and zero points become what its kernels take. For ONNX Runtime, layers
            with 8-bit inputs get weights of 7 bits in place of 8, whose sums are exact on every processor; `pinned`
            overrides that.
        weight_bits: Widths among which each weight may choose, from 1 (binary) to 8.
        activation_bits: Widths among which each layer's input may choose: 2 to 8, or 16 for floating
            point. One number fixes it. None means 8, or a choice of 2, 3, 4, 5, 6 and 8 where the
            budget limits BitOps.
        embedding_bits: Widths among which embeddings may choose. None takes `weight_bits`, or what the integration
            proposes: rows of rare tokens bear a width of 1. With 0 among them, blocks of columns
            (`embedding_columns`) may be left out.
        embedding_parts: Tables into which an embedding of 4096 rows or more is split, each with a width of its
            own: rows are sorted by how often the data looks them up, and each table has 1.5 times the rows of the
            one before it. Where each row lies is stored, and counted. Embeddings that are tied, or named by
            `exclude`, `pinned` or `groups`, stay whole. None means 1, or what the integration proposes.
        embedding_columns: Blocks of columns into which each of these tables is split, each with a width of its own:
            rows are turned onto their principal axes, so that the first columns vary most, and a layer turns back
            what was looked up. It is quantized, and counted. None means 1, or what the integration proposes.
        activation_scheme: Where steps of quantized inputs come from: `"static"`, calibrated, one a tensor; or
            `"dynamic"`, computed when a linear layer runs, one for each row (token), which costs a little time
            and is much closer where tokens differ, as in transformers. Convolutions stay static. None means
            `"static"`, or what the integration proposes.
        group_size: Inputs of a channel of linear layers and embeddings that share one step and one zero
            point (32, 64, 128); 0 gives each channel one step and no zero point. Of several, such as
            `(0, 64, 128)`, each layer takes at each width the one with the smallest error for its bits. None means
            0, or what the integration proposes for a model (64 for language models, a choice for other models of
            text).
        zero_points: Zero points of groups: `"fractional"`, or `"whole"`, as ONNX Runtime's fast kernels want
            them. None means fractional, but whole for `target="onnxruntime"`.
        pinned: Site name or shell pattern to a fixed width (`8`) or pair (`(8, 8)`), out of the search. A name goes
            before patterns: `{"head": 8, "*": 4}`.
        groups: Lists of names or shell patterns of sites, the layers that are quantized: those of one list share
            their widths.
        exclude: Names or shell patterns of layers that stay in floating point and do not count as sites; the name
            of a module is for all layers in it.
        sensitivities: How what each width costs alone is found: `"measured"` runs the network for each;
            `"fisher"` estimates it to second order from a few backward passes, for networks that are too large for
            that; `"both"` measures it, and where fine-tuning follows weighs the second order as well: training
            repairs less of it. None means `"both"`, or what the integration proposes.
        block: MetaQuantNet block of each site: `"dense"` (the paper's), `"low_rank"`, `"table"` (no
            network, the ablation), or `"auto"`: dense for small sites, low-rank for large ones.
        hidden: Hidden units of a MetaQuantNet block.
        rank: Rank-one terms of a `low_rank` block.
        dense_limit: With `block="auto"`, the most weights of a site that gets a `dense` block.
        loss: `"auto"` (KL for class scores, relative squared error for anything else), `"kl"`, `"mse"`,
            or a function of the student's and the teacher's outputs that returns a scalar tensor.
        temperature: Divides class scores in the KL divergence that training minimises; distances are measured at 1.
            None means 2, or what the integration proposes.
        block_loss: Weight, beside the loss, of what the outputs of the network's blocks differ by from the float
            model's (the mean relative squared error over blocks), in meta-training and at the beginning of
            fine-tuning, half-way through which it is 0; 0 compares the network's output alone. None means 4,
            or what the integration proposes.
        meta_steps: Optimizer steps of meta-training; None takes the effort's.
        search_evaluations: Policies scored by the search; None takes the effort's.
        finetune_steps: Optimizer steps of fine-tuning; None takes the effort's.
        learning_rate: Adam's peak rate in meta-training and fine-tuning, the same for all weights. None takes
            what the integration proposes, or else gives each weight 1 % of its root mean square, and in fine-tuning
            half of that for each bit above two, so that small and large, narrow and wide ones move by as many
            quantization steps; less for layers of more than 64 input channels, by the root of how many they are;
            and less for steps of fewer than 128 samples, by the root of how many they are. In fewer than 300
            steps of fine-tuning it is more, by the root of how many times fewer they are, to twice. Fine-tuning
            that a tenth of its steps led twice as far away begins again at 0.3 of these rates, and at 0.1.
        step_learning_rate: Adam's peak rate for the (logarithmic) quantization steps; None takes what the
            integration proposes, or else 2e-3, and less for steps of fewer than 128 samples.
        rounding: Integers from which fine-tuning starts: `"nearest"`, or `"second_order"`, which rounds weights
            column by column, layer after layer, and makes up for the error of those before (GPTQ). None means
            the second for float weights and the first for generated ones, which were trained with it (and for
            `effort="smoke"`), or what the integration proposes.
        train_float: Whether what stays float (biases, normalisation, excluded layers) is trained along. None
            means True, or what the integration proposes.
        finetune_from: `"float"` retrains from the float weights, `"generated"` starts from the MetaQuantNet's,
            `"closest"` from whichever are closer to the float model on held-out data. None means the first for
            100 steps of fine-tuning or more and the last for fewer, or what the integration proposes.
        population: Policies that survive a generation of the search.
        crossover: Probability that an offspring is recombined with a second parent.
        batch_size: Samples a batch where `data` is a Dataset; iterables of batches keep their own. None
            takes 64 (8 for `effort="smoke"`), or what the integration proposes.
        holdout: Most samples kept out of training to score policies; None takes the effort's.
        recalibration: Training samples on which BatchNorm statistics are re-estimated for each candidate, and 16
            times as many before fine-tuning that rounds to the nearest; None takes the effort's.
        calibration_batches: Batches from which activation ranges and moments are taken; None takes 4, or what
            the integration proposes. Weights are rounded to second order by as many, and by
            more where they hold fewer than 256 samples, up to 64.
        sequence_length: Tokens of a sample where `data` is text; None takes what the integration proposes.
        self_written: Share of the text that a model which writes text is trained on that it writes itself,
            0 to 1, where `data` is text: up to 128 samples with effort `"fast"`, 384 with `"balanced"`, 2048 with
            `"best"`, beside as much of yours as makes up the rest. None means 0, or what the integration proposes.
        processor: Tokenizer or image processor, where `data` is text or pictures.
        prepare_batch: Splits a batch into `(args, kwargs, labels)` where the rules of
            `hq_plugin.data` do not fit.
        profile: Times of layers on a machine, where a budget limits latency: a `hq_plugin.profiles.Profile` or
            the path of one. None measures this machine.
        checkpoint_dir: Directory in which sensitivities, meta-training, search and fine-tuning keep what they
            have done: the same call, started again after it was killed, goes on from there to the same result.
        checkpoint_seconds: Seconds between two states of training there.
        progress: Progress bars on stderr; None shows them on a terminal, and elsewhere a line every half minute.
        trackers: Experiment trackers that meta-training, search and fine-tuning log to: names that accelerate
            knows (`"tensorboard"`, `"wandb"`, `"mlflow"`, ...), or its tracker objects, which are left open.
        tracker_dir: Directory of trackers that write files.
    """

    effort: Effort = "balanced"
    seed: int = 0
    target: Literal["storage", "torch", "onnxruntime"] = "storage"
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    activation_bits: tuple[int, ...] | int | None = None
    embedding_bits: tuple[int, ...] | int | None = None
    embedding_parts: int | None = None
    embedding_columns: int | None = None
    activation_scheme: Literal["static", "dynamic"] | None = None
    group_size: int | tuple[int, ...] | None = None
    zero_points: Literal["fractional", "whole"] | None = None
    pinned: Mapping[str, int | tuple[int, int]] | None = None
    groups: tuple[tuple[str, ...], ...] = ()
    exclude: tuple[str, ...] = ()
    sensitivities: Literal["both", "measured", "fisher"] | None = None
    block: BlockKind = "auto"
    hidden: int = 16
    rank: int = 4
    dense_limit: int = 65_536
    loss: Literal["auto", "kl", "mse"] | LossFunction = "auto"
    temperature: float | None = None
    block_loss: float | None = None
    meta_steps: int | None = None
    search_evaluations: int | None = None
    finetune_steps: int | None = None
    learning_rate: float | None = None
    step_learning_rate: float | None = None
    rounding: Literal["nearest", "second_order"] | None = None
    train_float: bool | None = None
    finetune_from: Literal["closest", "generated", "float"] | None = None
    population: int = 24
    crossover: float = 0.6
    batch_size: int | None = None
    holdout: int | None = None
    recalibration: int | None = None
    calibration_batches: int | None = None
    sequence_length: int | None = None
    self_written: float | None = None
    processor: Any = None
    prepare_batch: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] | None = None
    profile: Any = None
    checkpoint_dir: str | None = None
    checkpoint_seconds: float = 60.0
    progress: bool | None = None
    trackers: tuple[Any, ...] = ()
    tracker_dir: str | None = None

    def __post_init__(self) -> None:
        self._check_choice("effort", tuple(EFFORTS))
        self._check_choice("target", tuple(TARGETS))
        self._check_choice("block", ("auto", "dense", "low_rank", "table"))
        for name, choices in (
            ("sensitivities", ("both", "measured", "fisher")),
            ("rounding", ("nearest", "second_order")),
            ("finetune_from", ("closest", "generated", "float")),
            ("activation_scheme", ("static", "dynamic")),
            ("zero_points", ("fractional", "whole")),
        ):
            if getattr(self, name) is not None:
                self._check_choice(name, choices)
        if isinstance(self.processor, str):
            raise ConfigError(
                f"processor={self.processor!r} is a string; give the object: AutoTokenizer.from_pretrained(...)."
            )
        if not callable(self.loss):
            self._check_choice("loss", ("auto", "kl", "mse"))
        for name in ("weight_bits", "embedding_bits"):
            if name == "weight_bits" or self.embedding_bits is not None:
                object.__setattr__(self, name, self._fast_widths(name))
        if self.activation_bits is not None:
            widths = _widths("activation_bits", self.activation_bits, ACTIVATION_BITS)
            object.__setattr__(self, "activation_bits", widths)
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))
        listed = isinstance(self.groups, (list, tuple, type(None)))
        if not listed or any(isinstance(group, str) for group in self.groups or ()):
            raise ConfigError(f'groups={self.groups!r} must be lists of names or patterns: [["first", "second"]].')
        object.__setattr__(self, "groups", tuple(_patterns("groups", group) for group in self.groups or ()))
        for name in ("meta_steps", "search_evaluations", "finetune_steps"):
            self._check_number(name, least=0, optional=True)
        self._check_number("seed", least=0)
        if self.seed >= 2**32:
            raise ConfigError(f"seed={self.seed!r} must be below 2**32.")
        if self.pinned is not None:
            if not isinstance(self.pinned, Mapping):
                raise ConfigError(f'pinned={self.pinned!r} must map names or patterns to widths: {{"head": 8}}.')
            pinned = {k: tuple(v) if isinstance(v, list) else v for k, v in self.pinned.items()}
            object.__setattr__(self, "pinned", pinned)
        for name in ("hidden", "rank", "population"):
            self._check_number(name, least=1)
        for name in (
            "holdout",
            "recalibration",
            "batch_size",
            "sequence_length",
            "calibration_batches",
            "embedding_parts",
            "embedding_columns",
        ):
            self._check_number(name, least=1, optional=True)
        if isinstance(self.group_size, (list, tuple)):
            sizes = tuple(self.group_size)
            if not sizes or not all(type(size) is int and size >= 0 for size in sizes):
                raise ConfigError(f"group_size={self.group_size!r} must be whole numbers of at least 0.")
            object.__setattr__(self, "group_size", sizes)
        else:
            self._check_number("group_size", least=0, optional=True)
        for name in ("learning_rate", "step_learning_rate", "temperature"):
            self._check_real(name, "a positive number", lambda value: 0 < value < math.inf)
        self._check_real("block_loss", "a number, 0 or more", lambda value: 0 <= value < math.inf)
        self._check_real("checkpoint_seconds", "a number, 0 or more", lambda value: value >= 0)
        self._check_real("self_written", "a share, 0 to 1", lambda value: 0 <= value <= 1)
        self._check_real("crossover", "a probability, 0 to 1", lambda value: 0 <= value <= 1)
        for name in ("checkpoint_dir", "tracker_dir"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(getattr(self, name)))
        one = self.trackers is not None and not isinstance(self.trackers, (list, tuple))
        object.__setattr__(self, "trackers", (self.trackers,) if one else tuple(self.trackers or ()))
        try:
            check_types(self)
        except TypeError as error:
            raise ConfigError(f"An option is not possible: {error}.") from error

    def _fast_widths(self, name: str) -> tuple[int, ...]:
        """Returns the given widths of weights that the target runs fast."""
        left_out = (LEFT_OUT,) if name == "embedding_bits" else ()
        widths = _widths(name, getattr(self, name), (*left_out, *WEIGHT_BITS))
        fast = tuple(bits for bits in widths if bits in (*left_out, *TARGETS[self.target]))
        if not fast:
            raise ConfigError(
                f"{name}={getattr(self, name)!r}: {self.target} runs none of them fast, but "
                f'{", ".join(map(str, TARGETS[self.target]))}. Add one of these, or choose target="storage".'
            )
        return fast

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(
                f"{name}={getattr(self, name)!r} is not possible. Choose one of {', '.join(choices)}."
            )

    def _check_number(self, name: str, least: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}.")

    def _check_real(self, name: str, wanted: str, holds: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if value is None and self.__dataclass_fields__[name].default is None:
            return
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not holds(value):
            raise ConfigError(f"{name}={value!r} must be {wanted}.")

    @property
    def steps(self) -> Steps:
        """The effort's step counts, with those given explicitly in their place."""
        preset = EFFORTS[self.effort]
        given = {
            "meta": self.meta_steps,
            "evaluations": self.search_evaluations,
            "finetune": self.finetune_steps,
            "holdout": self.holdout,
            "recalibration": self.recalibration,
        }
        return replace(preset, **{name: value for name, value in given.items() if value is not None})

    @property
    def whole_zero_points(self) -> bool:
        """Whether the zero points of groups are whole numbers."""
        return (self.zero_points or ("whole" if self.target == "onnxruntime" else "fractional")) == "whole"

    def filled(self, proposed: Mapping[str, Any] | None = None) -> Config:
        """Returns a copy in which what is None has a value.

        Args:
            proposed: Values that an integration proposes for a model; they come before the general ones.
        """
        values = {**DEFAULTS, "batch_size": EFFORTS[self.effort].batch, **(proposed or {})}
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})

    def with_options(self, options: Mapping[str, Any]) -> Config:
        """Returns a copy with `options` in place.

        Raises:
            ConfigError: An option does not exist.
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"There is no option {name!r}. {hint}Possible are: {', '.join(known)}.")
        return replace(self, **options)

    def to_json(self) -> dict[str, Any]:
        """Returns the options as JSON values; functions are written as their names."""
        data = asdict(
            replace(
                self,
                prepare_batch=None,
                processor=None,
                profile=None,
                trackers=tuple(getattr(tracker, "name", tracker) for tracker in self.trackers),
                loss="auto" if callable(self.loss) else self.loss,
            )
        )
        data["prepare_batch"] = _name_of(self.prepare_batch)
        data["loss"] = _name_of(self.loss)
        plain: dict[str, Any] = json.loads(json.dumps(data))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        """Reads what `to_json` wrote, without functions: who reads a session asks for them again."""
        values = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        values["prepare_batch"] = values["processor"] = values["profile"] = None
        values["trackers"] = ()
        if values.get("loss") not in ("auto", "kl", "mse"):
            values["loss"] = "auto"
        return cls(**values)


def _name_of(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', type(value).__name__)}"


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """Returns names or patterns of layers; None has none."""
    if isinstance(value, str) or not isinstance(value, (Iterable, type(None))):
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; give a list of names or patterns.")
    patterns = tuple(value or ())
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{name}={value!r} must be a list of names or patterns.")
    return patterns


def _widths(name: str, value: Any, possible: tuple[int, ...]) -> tuple[int, ...]:
    widths = (value,) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(widths, str):
        raise ConfigError(f"{name}={value!r} is text; give a width or a list of widths: [2, 4].")
    try:
        ordered = tuple(sorted(set(widths)))
    except TypeError:
        raise ConfigError(f"{name}={value!r} must be a width or a list of widths.") from None
    wrong = [width for width in ordered if width not in possible or type(width) is not int]
    if wrong or not ordered:
        raise ConfigError(f"{name}={value!r}: possible widths are {', '.join(map(str, possible))}.")
    return ordered
