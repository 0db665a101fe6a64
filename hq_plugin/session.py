"""`Session`: a meta-trained network, which turns any budget into a packed model without training again.

The pipeline of the method, in the order of its steps: `create` meta-trains (step 1), `search` finds a
policy (step 2), `finetune` trains it on and converts it (steps 3 and 4); `quantize` is the last three.
"""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import nn

from hq_plugin import adapters, torch_ao
from hq_plugin.allocation import best_uniform, dynamic_programming
from hq_plugin.batch import Batch
from hq_plugin.blocks import find_blocks
from hq_plugin.budget import Budget
from hq_plugin.checkpoint import Checkpoint
from hq_plugin.config import Config
from hq_plugin.conversion import convert_network
from hq_plugin.cost import CostTable, Resource, Table
from hq_plugin.data import Data
from hq_plugin.distillation import Fidelity, LossFunction, loss_name
from hq_plugin.distribution import alive_together, in_first, processes
from hq_plugin.errors import BudgetError, HQWarning, PolicyError
from hq_plugin.findings import group_sensitivities, model_name, predicted_front, scored_history, with_activations
from hq_plugin.finetune import (
    FineTuned,
    finetune_network,
    float_network,
    generated_network,
    possible_starts,
    warn_of_no_gain,
)
from hq_plugin.found import Found
from hq_plugin.lasting import LastingLosses, counts_second_order
from hq_plugin.memory import peak_memory
from hq_plugin.meta_training import build_network, meta_train_network
from hq_plugin.metric import EvalFunction, Metric, measured_if_possible
from hq_plugin.modes import gradients
from hq_plugin.moments import Moments, SiteMoments
from hq_plugin.policy import HybridPolicy
from hq_plugin.preparation import (
    at_work,
    calibration_batches,
    decisive,
    device_of,
    distance_of,
    open_checkpoint,
    rounding_batches,
    search_space,
    teacher_of,
)
from hq_plugin.profiling import policy_milliseconds, with_latency
from hq_plugin.ranking import distances, rerank
from hq_plugin.rates import BACK_OFF
from hq_plugin.result import Baseline, Result, versions
from hq_plugin.rewriting import float_state
from hq_plugin.sampling import PolicySampler
from hq_plugin.scoring import Scorer, evaluating
from hq_plugin.search import Scored, additive_sensitivities, genetic_search
from hq_plugin.second_order import calibration_moments, second_order, weight_losses
from hq_plugin.seeding import seeded
from hq_plugin.sequential_rounding import start_from_good_integers
from hq_plugin.sharding import placed
from hq_plugin.space import SearchSpace
from hq_plugin.storage import fingerprint
from hq_plugin.timed_search import search_and_time
from hq_plugin.tracking import track, tracking

P = ParamSpec("P")
T = TypeVar("T")

#: BatchNorm statistics are re-estimated on this many times the samples of a candidate before fine-tuning, which
#: keeps them.
RECALIBRATION_FACTOR = 16
#: Activation widths of the search where a budget limits BitOps and the user named none.
BITOPS_ACTIVATION_BITS = (2, 3, 4, 5, 6, 8)


def _stage(method: Callable[Concatenate[Session, P], T]) -> Callable[Concatenate[Session, P], T]:
    """Lets what is random in a method of `Session` follow from its seed, with its checkpoint for itself alone."""

    @functools.wraps(method)
    def stage(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> T:
        kept = self.checkpoint.held() if self.checkpoint else nullcontext()
        with seeded(self.config.seed), gradients(), alive_together(), kept:
            return method(self, *args, **kwargs)

    return stage


class Session:
    """A float model and the MetaQuantNet that was trained for it. `hq_plugin.meta_train` makes one.

    Attributes:
        teacher: A copy of the float model, in eval mode.
        network: The prepared network that the MetaQuantNet drives.
        space: The search space.
        costs: What its policies cost.
        config: The options.
        device: Where the float model was, and where packed models are returned.
        sensitivities: What each width of each group costs alone, in the float model rounded, before
            meta-training.
        second_order: The same to second order, where it counts beside that.
        history: History of meta-training, one `{"step", "loss", "batch_statistics"}` a step.
        seconds: Wall time of the stages so far.
        memory: Most bytes in use so far at the end of each stage.
        scored: Every policy that the session's searches scored.
        source: Arguments of the command line that give the float model and its data, where it made the session.
        known_by: Checksum of the float model as it was given; of sessions that are not saved none.
    """

    def __init__(
        self,
        teacher: nn.Module,
        network: nn.Module,
        space: SearchSpace,
        data: Data,
        config: Config,
        loss: LossFunction,
        device: torch.device,
    ) -> None:
        self.teacher, self.network, self.space = teacher, network, space
        self.data, self.config = data, config
        self.device, self.loss = device, loss
        self.costs = CostTable(space)
        self.history: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, dict[str, int]] = {}
        self.scored: list[Scored] = []
        self.source: tuple[str, ...] = ()
        self.sensitivities: Table
        self.second_order: Table | None = None
        self.checkpoint: Checkpoint | None = None
        self.known_by = ""
        self.blocks = find_blocks(teacher, [site.name for site in space.table])
        self._scorer: Scorer | None = None

    @classmethod
    def create(
        cls,
        model: nn.Module,
        data: Data,
        config: Config,
        budget: Budget | None = None,
        *,
        share: bool = False,
        policy: HybridPolicy | None = None,
    ) -> Session:
        """Finds the sites, builds the MetaQuantNet and meta-trains it (step 1).

        Args:
            model: The float model; it is not changed.
            data: Prepared batches.
            config: Options.
            budget: Where it is known, policies are sampled around it.
            share: Whether the teacher's weights may be those of `model` and not a copy: for sessions that end
                before anyone can change them.
            policy: One that is to be fine-tuned.

        Raises:
            BudgetError: The budget cannot be met; found out before anything is trained.
            PolicyError: The search space does not have the policy; the same.
        """
        with seeded(config.seed), gradients():
            return cls._created(model, data, config, budget, share, policy)

    @classmethod
    def _created(
        cls,
        model: nn.Module,
        data: Data,
        config: Config,
        budget: Budget | None,
        share: bool,
        policy: HybridPolicy | None,
    ) -> Session:
        processes()  # which find each other here, before any of them writes or waits
        config = config.filled()
        if config.activation_bits is None:
            limits_bitops = budget is not None and budget.bitops is not None
            widths = BITOPS_ACTIVATION_BITS if limits_bitops else (8,)
            config = replace(config, activation_bits=widths)
        teacher = teacher_of(model, data, config, share=share)
        # Before it runs on all the data, since a forward may change its state: counters, rows with `max_norm`. One
        # whose teacher shares the model's memory is not saved.
        known_by = "" if share else fingerprint(float_state(teacher))
        space = search_space(teacher, data, config)
        if policy is not None:
            space.genome(policy)
        costs = CostTable(space)
        if budget is not None:
            with_latency(costs, budget, teacher, data.holdout[0].to(device_of(teacher)), config)
        focus = costs.resources(budget) if budget is not None else []
        began = time.perf_counter()
        device, teacher = device_of(teacher), at_work(teacher)
        loss = distance_of(teacher, data, config)
        moments: Mapping[str, Moments] = {}
        if config.sensitivities == "fisher":
            moments = calibration_moments(teacher, space, calibration_batches(teacher, data, config), config, loss)
        inputs = {name: seen for name, seen in moments.items() if isinstance(seen, SiteMoments)}
        importance = {name: seen.inputs for name, seen in inputs.items() if seen.kind == "linear"}
        network = build_network(teacher, space, data, config, importance)
        session = cls(teacher, network, space, data, config, loss, device)
        session.costs, session.known_by = costs, known_by
        session.checkpoint = open_checkpoint(teacher, data, config, budget)
        session.sensitivities = session._measure_sensitivities(moments)
        if counts_second_order(config):
            batches = calibration_batches(teacher, data, config)
            session.second_order = second_order(network, teacher, space, batches, config, loss)
            del batches  # before anything is trained
        measured = time.perf_counter()
        session.memory["sensitivities"] = peak_memory()
        session._meta_train(session._sampler(focus))
        session.seconds["sensitivities"] = measured - began
        session.seconds["meta_training"] = time.perf_counter() - measured
        session.memory["meta_training"] = peak_memory()
        return session

    @_stage
    def _meta_train(self, sampler: PolicySampler) -> None:
        self.scorer.forget_targets()
        self.history = meta_train_network(
            self.network, self.teacher, sampler, self.data, self.loss, self.blocks, self.config, self.checkpoint
        )

    @property
    def losses(self) -> LastingLosses:
        """What each width costs once the network is fine-tuned, by which policies are planned and chosen."""
        return LastingLosses(self.space, self.sensitivities, self.config.steps.finetune, self.second_order)

    def _sampler(self, focus: Sequence[Resource]) -> PolicySampler:
        """Returns the sampler of policies around limits; around the front of all budgets where there are none."""
        return PolicySampler(self.space, self.costs, self.losses.table, self.config.seed, focus)

    @property
    def scorer(self) -> Scorer:
        """Scores policies on the held-out data."""
        if self._scorer is None:
            self._scorer = Scorer(
                self.teacher,
                self.data,
                self.loss,
                self.config.steps.holdout,
                self.config.steps.recalibration,
                self.config.seed,
            )
        return self._scorer

    @_stage
    def sampler(self, budget: str | Budget | None = None) -> PolicySampler:
        """Returns what gives the policy of each step of meta-training, for a training loop of your own.

        Args:
            budget: Around which policies are sampled; None samples near the front of all budgets.
        """
        focus = [] if budget is None else self._resources(budget)
        return self._sampler(focus)

    @_stage
    def search(self, budget: str | Budget, *, eval_fn: EvalFunction | None = None) -> Found:
        """Finds the best policy under a budget (step 2); nothing is trained.

        A limit of latency on this machine is kept by what is found when it is run, and not only by a profile.

        Args:
            budget: As for `hq_plugin.quantize`.
            eval_fn: As for `quantize`; what it says of the best policy of each kind is in the baselines.

        Raises:
            BudgetError: The budget cannot be read or met.
        """
        budget = Budget.parse(budget)
        if budget.latency_ms is None or self.config.profile is not None:
            return self._search(budget, eval_fn)
        found = search_and_time(
            lambda limits: self._search(limits, eval_fn),
            lambda policy: self._milliseconds(policy, budget.batch),
            budget,
        )
        genome = self.space.genome(found.policy)
        used = {resource.name: resource.used(genome) for resource in self._resources(budget)}
        used["latency_ms"] = (found.costs.latency_ms or 0.0) / budget.latency_ms
        return replace(found, used=used, budget=budget)

    @property
    def _example(self) -> Batch:
        """The first held-out batch, where the float model was."""
        return self.data.holdout[0].to(self.device)

    @property
    def _at_home(self) -> nn.Module:
        """The teacher where the float model was: it may work on another device than results are to run on."""
        here = device_of(self.teacher) == self.device
        return self.teacher if here else copy.deepcopy(self.teacher).to(self.device)

    def _milliseconds(self, policy: HybridPolicy, samples: int) -> float:
        """Times the model under a policy, in the first process where there are several."""
        teacher, batch = self._at_home, self._example

        return in_first(
            lambda: policy_milliseconds(teacher, self.space, policy, batch, samples, self.config.target)
        )

    def _search(self, budget: Budget, eval_fn: EvalFunction | None) -> Found:
        """Finds the best policy by what policies are known to cost."""
        resources, losses = self._resources(budget), self.losses
        began = time.perf_counter()
        own_loop = self.checkpoint is not None and not self.config.steps.meta
        trained = in_first(lambda: fingerprint(dict(self.network.named_parameters()))) if own_loop else ""
        with evaluating(self.network) as network:
            samples = self.scorer.samples

            def score(policies: Sequence[HybridPolicy]) -> list[float]:
                return distances(self.scorer, network, policies, samples, "search", self.checkpoint, trained)

            uniform = best_uniform(self.space, self.costs, resources)
            found = genetic_search(self.space, resources, losses, score, self.config, uniform)
            ranked = rerank(self.scorer, network, self.costs, losses, found.leaders, found.seeds)
            if eval_fn is not None:
                ranked = {name: self._with_metric(baseline, network, eval_fn) for name, baseline in ranked.items()}
        self.scored += found.evaluations
        genomes = {name: self.space.genome(baseline.policy) for name, baseline in ranked.items()}
        chosen = min(ranked, key=lambda name: ranked[name].kl + losses.added(genomes[name]))
        genome = genomes[chosen]
        seconds = time.perf_counter() - began
        return Found(
            policy=ranked[chosen].policy,
            chosen=chosen,
            costs=ranked[chosen].costs,
            used={resource.name: resource.used(genome) for resource in resources},
            baselines=ranked,
            history=scored_history(self.costs, found.evaluations),
            seconds={
                "search": seconds,
                "search_scoring": found.scoring_seconds,
                "search_overhead": found.seconds - found.scoring_seconds,
                "search_reranking": seconds - found.seconds,
            },
            memory={"search": peak_memory()},
            front=predicted_front(self.costs, self.sensitivities, losses, resources[0].cost),
            budget=budget,
        )

    def _with_metric(self, baseline: Baseline, network: nn.Module, eval_fn: EvalFunction) -> Baseline:
        """Returns a baseline with what `eval_fn` says of the network that is generated for it."""
        torch_ao.apply_policy(network, baseline.policy)
        self.scorer.recalibrate(network)
        metric = measured_if_possible(eval_fn, network, f"the {baseline.name} policy before fine-tuning")
        return replace(baseline, metric=metric)

    def _resources(self, budget: str | Budget) -> list[Resource]:
        """Turns a budget into limits; measures the machine first, where latency is limited."""
        budget = Budget.parse(budget)
        with_latency(self.costs, budget, self._at_home, self._example, self.config)
        return self.costs.resources(budget)

    @_stage
    def baselines(self, budget: str | Budget) -> dict[str, HybridPolicy]:
        """Returns the policies that need no search: best uniform, and dynamic programming.

        Both keep the budget. Of several uniform policies, none of which exceeds another in both widths,
        the one with the widest weights is returned.

        Args:
            budget: As for `hq_plugin.quantize`.

        Returns:
            Policies by `"uniform"` and `"dynamic_programming"`; no uniform one where none fits.

        Raises:
            BudgetError: The budget cannot be read or met.
        """
        resources = self._resources(budget)
        planned = dynamic_programming(self.losses.table, resources)
        policies = {"dynamic_programming": self.space.policy(planned)}
        uniform = best_uniform(self.space, self.costs, resources)
        if uniform:
            policies["uniform"] = self.space.policy(uniform[-1])
        return policies

    @_stage
    def _measure_sensitivities(self, moments: Mapping[str, Moments]) -> Table:
        """Finds, on the network as it is, what each width of each group costs alone.

        Args:
            moments: Moments of the sites, from which the weights' part is estimated; none measures it.
        """
        weights = weight_losses(self.network, self.space, moments)
        samples = self.scorer.quick
        with evaluating(self.network) as network:

            def score(policies: Sequence[HybridPolicy]) -> list[float]:
                return distances(self.scorer, network, policies, samples, "sensitivities", self.checkpoint)

            narrowest = self.config.effort == "smoke"
            return additive_sensitivities(self.space, score, self.config.progress, weights, narrowest=narrowest)

    def pareto(self, budgets: Iterable[str | Budget]) -> list[Found]:
        """Searches several budgets on the one MetaQuantNet, and returns what was found for each.

        Args:
            budgets: Each as for `hq_plugin.quantize`.

        Raises:
            BudgetError: A budget cannot be read or met.
        """
        if isinstance(budgets, (str, Budget)):
            raise BudgetError(f"pareto takes several budgets: pareto([{str(budgets)!r}, ...]).")
        return [self.search(budget) for budget in budgets]

    def quantize(self, budget: str | Budget, *, eval_fn: EvalFunction | None = None) -> nn.Module:
        """Searches, fine-tunes and converts (steps 2 to 4) for a budget; the MetaQuantNet stays as it is.

        Args:
            budget: As for `hq_plugin.quantize`.
            eval_fn: Called with a model in eval mode, returns a number to report; higher or lower, it decides
                nothing. It sees the float model first, then the baselines, and the result.

        Returns:
            The packed model, with `.hq` (a `Result`).

        Raises:
            BudgetError: The budget cannot be read or met.
        """
        budget = Budget.parse(budget)
        with tracking(self.config):
            metric = Metric.tried(eval_fn, self._at_home)
            return self.finetune(self.search(budget, eval_fn=metric), eval_fn=metric)

    @_stage
    def finetune(
        self,
        found: Found | HybridPolicy,
        *,
        budget: str | Budget | None = None,
        eval_fn: EvalFunction | None = None,
        start: Literal["closest", "generated", "float"] | None = None,
        steps: int | None = None,
    ) -> nn.Module:
        """Fine-tunes a policy and converts it (steps 3 and 4).

        Args:
            found: What `search` returned, or any policy of the search space.
            budget: For the report, and what kernels are chosen for; None is what was searched under.
            eval_fn: As for `quantize`.
            start: In place of the option `finetune_from`.
            steps: In place of the option `finetune_steps`.

        Returns:
            The packed model, with `.hq` (a `Result`).

        Raises:
            PolicyError: The policy is for another model or outside the search space.
            BudgetError: The budget cannot be read.
        """
        found = self._found(found)
        if budget is not None:
            budget = Budget.parse(budget)
            found = replace(found, budget=budget, used=self._used(found, budget))
        budget = found.budget
        config = replace(
            self.config,
            finetune_from=start or self.config.finetune_from,
            finetune_steps=self.config.steps.finetune if steps is None else steps,
        )
        metric = Metric.tried(eval_fn, self._at_home)
        tuned = self._trained_on(found.policy, config)
        memory = {**self.memory, **found.memory, "finetune": peak_memory()}
        began = time.perf_counter()
        packed = convert_network(tuned.network, self.data.holdout[0], config, budget, self.device)
        spent = {"finetune": tuned.seconds, "convert": time.perf_counter() - began}
        labelled = any(batch.labels is not None for batch in self.scorer.batches)
        fidelity, float_accuracy = tuned.fidelity, self._measured(self.teacher).accuracy if labelled else None
        packed.hq = Result(  # type: ignore[assignment]
            policy=found.policy,
            budget=str(budget) if budget is not None else "given policy",
            chosen=found.chosen,
            costs=found.costs,
            used=found.used,
            float_size=self.space.table.float_bytes,
            kl=fidelity.distance,
            agreement=fidelity.agreement,
            accuracy=fidelity.accuracy,
            float_accuracy=float_accuracy,
            metric=measured_if_possible(metric, packed, "the result"),
            float_metric=None if metric is None else metric.of_float,
            baselines=found.baselines,
            layers=with_activations(self.costs.layers(found.policy), packed),
            float_layers=[vars(layer) for layer in self.space.table.float_layers],
            history={"meta_training": self.history, "search": found.history, "finetune": tuned.history},
            seconds={**self.seconds, **found.seconds, **spent},
            memory={**memory, "convert": peak_memory()},
            config=config.to_json(),
            versions=versions(),
            model=model_name(self.teacher),
            distance=loss_name(self.loss),
            sensitivities=group_sensitivities(self.space, self.sensitivities),
            front=found.front,
        )
        with tracking(config):
            accuracies = {"accuracy": fidelity.accuracy, "float_accuracy": float_accuracy}
            costs = {"bits": found.costs.weight_bits, "bytes": found.costs.size}
            track("result", 0, kl=fidelity.distance, **costs, **accuracies)
        adapter = adapters.find(packed)
        return packed if adapter is None else adapter.finish(packed)

    def _found(self, found: Found | HybridPolicy) -> Found:
        """Returns what a search found, or what there is to say of a policy that was given in its place."""
        if isinstance(found, Found):
            self.space.genome(found.policy)  # raises where it is another session's
            return found
        if not isinstance(found, HybridPolicy):
            raise PolicyError(
                f"finetune takes what session.search returned, or a HybridPolicy, not a {type(found).__name__}: "
                "HybridPolicy.from_json(...) reads one that was saved."
            )
        costs = self.costs.costs(self.space.genome(found))
        front = predicted_front(self.costs, self.sensitivities, self.losses, self.costs.weight_bytes)
        return Found(found, "given", costs, {}, {}, [], {}, front=front)

    def _used(self, found: Found, budget: Budget) -> dict[str, float]:
        """Returns the share of each limit of a budget that a policy uses, and warns where it exceeds one."""
        # Nothing is measured for a report.
        known = budget.latency_ms is None or self.costs.latency_batch == budget.batch
        limits = budget if known else replace(budget, latency_ms=None)
        genome = self.space.genome(found.policy)
        used = {resource.name: resource.used(genome) for resource in self.costs.resources(limits)}
        if over := [f"{share:.0%} of {name}" for name, share in used.items() if share > 1]:
            warnings.warn(
                f"The policy exceeds the budget {budget}: it uses {', '.join(over)}.", HQWarning, stacklevel=4
            )
        return used

    def _trained_on(self, policy: HybridPolicy, config: Config) -> FineTuned:
        """Trains the network of a policy on (step 3), unless that makes it worse."""
        began = time.perf_counter()
        config, untrained, network = self._closest_start(policy, config)
        self.scorer.forget_targets()
        stage = f"fine-tuning of {policy.to_json()} by {decisive(config)}"
        for share in (1.0, *BACK_OFF):
            if share < 1:
                del network
                network = self._start(policy, config)
            history, again = finetune_network(
                network, self.teacher, self.data, self.loss, self.blocks, config, self.checkpoint, stage, share
            )
            if not again:
                break
        fidelity = self._measured(network) if history else untrained
        # The first process decides: what each has measured may differ in the last bits.
        before, after = untrained.distance, fidelity.distance
        if not in_first(lambda: after <= before):
            # A handful of steps can be worse than none; then none are taken. A copy kept for this rare case
            # would cost as much memory as the model.
            warn_of_no_gain(config.steps.finetune, before, after)
            del network
            network, fidelity = self._start(policy, config), untrained
        return FineTuned(network, fidelity, history, time.perf_counter() - began)

    def _closest_start(self, policy: HybridPolicy, config: Config) -> tuple[Config, Fidelity, nn.Module]:
        """Returns the start that is closest to the float model: its options, how close it is, and itself."""
        *others, last = starts = possible_starts(config)
        # A copy of the best so far would cost as much memory as the model.
        measured = [self._measured(self._start(policy, start)) for start in others]
        network = self._start(policy, last)
        measured.append(self._measured(network))
        # The first process decides, as it does on what training gained.
        closest = in_first(lambda: min(range(len(starts)), key=lambda at: measured[at].distance))
        if starts[closest] is not last:
            del network
            network = self._start(policy, starts[closest])
        return starts[closest], measured[closest], network

    def _start(self, policy: HybridPolicy, config: Config) -> nn.Module:
        """Returns the network that fine-tuning starts from."""
        with seeded(config.seed):  # so that it may be started again from the same steps and integers
            if config.finetune_from == "float":
                network = float_network(self.teacher, policy, self.data, config)
            else:
                network = generated_network(self.network, policy)
            if config.rounding == "second_order":
                batches = rounding_batches(self.teacher, self.data, config)
                if start_from_good_integers(network, self.teacher, batches, self.loss):
                    return network
        with placed(network, keep=True) as running:
            self.scorer.recalibrate(running, RECALIBRATION_FACTOR * self.scorer.recalibration)
        return network

    def _measured(self, model: nn.Module) -> Fidelity:
        """Measures a model with the teacher's inputs and outputs on all held-out samples."""
        with placed(model) as running:
            return self.scorer.measure(running)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Saves the session; `hq_plugin.load_session(directory, model)` reads it back.

        Args:
            directory: A new directory, or an empty one.
            overwrite: Whether a session that was saved there before may be replaced.

        Returns:
            The directory.

        Raises:
            ArtifactPathError: The directory holds something else, or cannot be written.
        """
        from hq_plugin.session_store import save_session

        return save_session(self, directory, overwrite=overwrite)
