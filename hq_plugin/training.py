"""The one training loop: a prepared network learns from its float teacher, on accelerate.

Meta-training and fine-tuning are this loop with different networks and a different `before_step`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast
from torch import Tensor, nn

from hq_plugin.batch_statistics import agree_on_statistics, batch_statistics_pay, follow_batches
from hq_plugin.blocks import BlockOutputs
from hq_plugin.checkpoint import Checkpoint
from hq_plugin.data import Data
from hq_plugin.distillation import LossFunction
from hq_plugin.distribution import share_of_batch, warn_if_alone
from hq_plugin.errors import HQWarning, TrainingError
from hq_plugin.held_out import held_out_distance
from hq_plugin.interruption import Interruption, deferred, interrupted
from hq_plugin.modes import KeptValues, set_training_modes, without_recurrent_dropout
from hq_plugin.progress import progress
from hq_plugin.rates import Rates
from hq_plugin.sharding import placed, sharded
from hq_plugin.tracking import track

#: How often a good state is kept.
SNAPSHOTS = 20
#: Share of the steps after which it is seen whether BatchNorm is to train with batches' statistics, and whether the
#: steps led away; of fewer steps than that the latter cannot be told.
SEEN, TELLING = 0.1, 5
#: How many times as far away is too far. Rates are at their peak then, and many a network that is a little further
#: ends closer for it: begun again at once, a MobileNetV3 of 2.2 bits ended at 0.0070, not at 0.0050.
LED_AWAY = 2.0
#: Gradients are clipped to this norm: one unlucky low-bit policy must not undo the others.
CLIP = 1.0
#: Devices on which torch's Adam is one kernel.
_FUSED_ADAM = ("cpu", "cuda")


@dataclass
class Task:
    """What one training stage needs.

    Attributes:
        name: Name of the stage, for progress bars and messages.
        network: The prepared network; it is trained in place.
        teacher: The float model, in eval mode.
        data: Batches.
        loss: Distance of the network's output to the teacher's.
        blocks: Names of blocks whose outputs are compared as well; none compares the network's alone.
        block_loss: Weight of what they differ by, beside `loss`, at the first step.
        blocks_until: Share of the steps over which that falls to 0, evenly; None keeps it.
        steps: Optimizer steps.
        rates: Learning rates.
        batch_statistics: Whether BatchNorm normalises by each batch's own statistics, as weights that change
            from step to step need it. Else it keeps its running statistics: the loss is then that of the
            network as it will run, without the noise of the batches' statistics. None begins so, and changes
            after `SEEN` of the steps where the network is further from its teacher than that noise counts, and
            was so before the first: where rates rise, losses may for a while, of a network that is close.
        distance: Distance of outputs by which that is seen; None takes `loss`.
        backs_off: Whether to stop where `SEEN` of the steps led `LED_AWAY` times as far away from the teacher on
            held-out data, and BatchNorm does not change.
        before_step: Called with the network that runs and each step's number before its forward.
        checkpoint: Where the state is kept and found again; None keeps nothing.
        stage: Name of the stage there.
        show: Whether to show a progress bar; None on a terminal only.
        history: One `{"step", "loss", "batch_statistics"}` is added for each step; the last has `"led_away"` where
            training backed off.
    """

    name: str
    network: nn.Module
    teacher: nn.Module
    data: Data
    loss: LossFunction
    steps: int
    rates: Rates
    blocks: Sequence[str] = ()
    block_loss: float = 0.0
    blocks_until: float | None = None
    batch_statistics: bool | None = True
    distance: LossFunction | None = None
    backs_off: bool = False
    before_step: Callable[[nn.Module, int], None] = lambda network, step: None
    checkpoint: Checkpoint | None = None
    stage: str = ""
    show: bool | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def block_loss_at(self, step: int) -> float:
        """Returns the weight at a step of what outputs of blocks differ by."""
        if self.blocks_until is None:
            return self.block_loss
        return self.block_loss * max(0.0, 1 - step / (self.blocks_until * self.steps))


def train(task: Task) -> bool:
    """Runs a training stage.

    Returns:
        Whether it came to its end, and did not back off.

    Raises:
        TrainingError: The loss is not finite before any good state was kept.
    """
    if task.steps == 0:
        return True
    # Statistics of BatchNorm are averaged in the end: until then processes keep their own.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(kwargs_handlers=[unused])
    warn_if_alone()
    with (
        placed(task.network, keep=True, device=accelerator.device) as network,
        placed(task.teacher, device=accelerator.device) as teacher,
        without_recurrent_dropout(network),
        # Without a checkpoint there is nothing to be kept, and Ctrl-C need not wait.
        nullcontext(Interruption()) if task.checkpoint is None else deferred() as stop,
    ):
        return _train(task, accelerator, network, teacher, stop)


def _train(
    task: Task, accelerator: Accelerator, network: nn.Module, teacher: nn.Module, stop: Interruption
) -> bool:
    """Trains what runs in place of the task's network, until it is done, backs off or is asked to stop."""
    run = _Run(task, accelerator, network, teacher)
    if run.led_away:  # before it was interrupted
        return False
    watched = BlockOutputs(task.blocks if task.block_loss else ())
    with (
        progress(task.show) as bars,
        watched.watching(network, teacher, task.data.holdout[0].to(accelerator.device)) as blocks,
    ):
        bar = bars.task(task.name, total=task.steps)
        bar.advance(run.first)
        for step in range(run.first, task.steps):
            if step == run.seen:
                with blocks.resting():
                    run.look(step)
                if run.led_away:
                    break
            task.before_step(network, step)
            value = run.backward(step, blocks)
            if not math.isfinite(value):
                run.go_back(step, value)
                break
            run.step(step, value)
            bar.advance(loss=value)
            run.keep(step + 1, stop)
    return run.end()


@dataclass
class _Normalising:
    """Whether BatchNorm normalises by each batch's own statistics now.

    Not in `_Run`, since the course of the rates reads it: references in circles would keep networks in memory.
    """

    by_batch: bool


class _Run:
    """A stage as it runs in this process: network and teacher where they compute, optimizer and course.

    Attributes:
        first: The step to begin with: 0, or where a kept state left off.
        seen: The step before which is seen whether BatchNorm changes and whether training backs off.
    """

    def __init__(self, task: Task, accelerator: Accelerator, network: nn.Module, teacher: nn.Module) -> None:
        self.task, self.accelerator, self.network, self.teacher = task, accelerator, network, teacher
        self.seen = math.ceil(SEEN * task.steps)
        self._normalising = _Normalising(bool(task.batch_statistics))
        set_training_modes(network, self._normalising.by_batch)
        self._values = KeptValues(network)
        # Batches of a step, as accelerate is configured.
        self._parts = accelerator.gradient_accumulation_steps
        batches = task.data.forever(2 * accelerator.num_processes)
        ahead = next(batches)
        self._samples = ahead.size * self._parts
        self._batches = itertools.chain([ahead], batches)
        del ahead
        self._prepare()
        self._far = task.batch_statistics is None and batch_statistics_pay(*self._distances)
        self._began: float | None = None
        if task.backs_off and self.seen >= TELLING and task.data.holdout[0].size >= accelerator.num_processes:
            self._began = held_out_distance(*self._distances)
        self._good: tuple[int, dict[str, Tensor]] | None = None
        self.first = self._resume()

    @property
    def led_away(self) -> bool:
        """Whether the first steps led away from the teacher, and training backs off."""
        return bool(self.task.history) and self.task.history[-1].get("led_away", False)

    @property
    def _distances(self) -> tuple[nn.Module, nn.Module, Data, LossFunction, Accelerator]:
        """What it takes to measure how far the network is from its teacher."""
        return self.network, self.teacher, self.task.data, self.task.distance or self.task.loss, self.accelerator

    def _prepare(self) -> None:
        """Makes the optimizer and the course of its rates, and has accelerate spread the network."""
        task, network, accelerator = self.task, self.network, self.accelerator
        groups = task.rates.groups(task.network, network, self._samples, rises=task.batch_statistics is None)
        # One pass over weights and moments in place of a dozen, where torch has the kernel.
        trained, pieces = [p for group in groups for p in group["params"]], sharded()
        fused = all(p.device.type in _FUSED_ADAM and p.is_floating_point() for p in trained) and not pieces
        optimizer: Any = torch.optim.Adam(groups, fused=fused)
        normalising = self._normalising
        self._schedule = task.rates.schedule(optimizer, task.steps, lambda: normalising.by_batch)
        if pieces:
            self._wrapped, self._optimizer = network, accelerator.prepare_optimizer(optimizer)
        else:
            with warnings.catch_warnings():
                # torch renames `broadcast_buffers`, accelerate not yet.
                warnings.simplefilter("ignore", FutureWarning)
                self._wrapped, self._optimizer = accelerator.prepare(network, optimizer)
            for buffer in network.buffers():
                broadcast(buffer)  # in place; the processes' own may differ in their last bits
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]

    def _resume(self) -> int:
        """Goes to where a kept state left off, and returns the next step."""
        task, keep = self.task, self.task.checkpoint
        if keep is None:
            return 0
        first, task.history[:] = keep.restore(task.stage, self.network, self._optimizer)
        if self.led_away:
            return first
        if not self._normalising.by_batch and task.history and task.history[-1].get("batch_statistics", False):
            self._follow_batches()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch minds a schedule that moves before the optimizer
            for _ in range(first if first < task.steps else 0):  # a stage that is done needs no data
                for _ in range(self._parts):
                    next(self._batches)
                self._schedule.step()
        return first

    def _follow_batches(self) -> None:
        self._normalising.by_batch = True
        follow_batches(self.network)

    def look(self, step: int) -> None:
        """Sees, of a network that was far away, whether BatchNorm is to change, or else whether to back off."""
        if not self._far and self._began is None:
            return
        task = self.task
        self._values.forget()
        if self._far and batch_statistics_pay(*self._distances):
            self._follow_batches()
        elif self._began is not None and not held_out_distance(*self._distances) < LED_AWAY * self._began:
            task.history[-1]["led_away"] = True
            if task.checkpoint is not None:
                task.checkpoint.keep(task.stage, step, self.network, self._optimizer, task.history)

    def backward(self, step: int, blocks: BlockOutputs) -> float:
        """Computes the gradients of a step.

        Returns:
            The loss, its mean over processes: all of them see the same and stop together. Where it is not finite,
            so may gradients be.
        """
        task, accelerator = self.task, self.accelerator
        block_loss = task.block_loss_at(step)
        value = 0.0
        for part in range(self._parts):
            with nullcontext() if part == self._parts - 1 else accelerator.no_sync(self._wrapped):
                self._values.forget()
                batch, weight = share_of_batch(next(self._batches).to(accelerator.device))
                with accelerator.autocast(), nullcontext() if block_loss else blocks.resting():
                    with torch.no_grad():
                        target = batch.run(self.teacher)
                    loss = task.loss(batch.run(self._wrapped), target)
                    if block_loss and blocks.names:
                        loss = loss + block_loss * blocks.distance(batch)
                    loss = loss * weight
                value += float(accelerator.reduce(loss.detach(), "mean")) / self._parts
                if math.isfinite(value):
                    _backward(accelerator, loss)  # which divides by the parts
        return value

    def step(self, step: int, value: float) -> None:
        """Takes a step by the gradients of a finite loss."""
        # Only now is it known that the state is good.
        if self._good is None or step % max(1, self.task.steps // SNAPSHOTS) == 0:
            self._good = None  # first, so that two are never in memory
            self._good = (step, _state(self.network))
        self.accelerator.clip_grad_norm_(self._parameters, CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()  # gradients are as large as weights: the next forward has them not beside it
        self._schedule.step()
        self.task.history.append({"step": step, "loss": value, "batch_statistics": self._normalising.by_batch})
        track(self.task.name, step, loss=value, learning_rate=float(self._schedule.get_last_lr()[0]))

    def keep(self, step: int, stop: Interruption) -> None:
        """Keeps the state before a step where that is due, and stops where the user wants it."""
        task, keep = self.task, self.task.checkpoint
        if keep is None:
            return
        due = torch.tensor([float(keep.due()), float(stop.wanted)], device=self.accelerator.device)
        # The processes' clocks differ: they keep a state together or not at all.
        keeps, stops = self.accelerator.reduce(due).tolist()
        if keeps or stops:
            keep.keep(task.stage, step, self.network, self._optimizer, task.history)
        if stops:
            raise interrupted(f"{task.name}, after step {step} of {task.steps}", keep.directory)

    def go_back(self, step: int, value: float) -> None:
        """Goes back to the last good state after a loss that is not finite.

        Raises:
            TrainingError: There is none.
        """
        task = self.task
        self._optimizer.zero_grad()
        advice = f"Lower learning_rate (now {task.rates.told(self._samples)}) or look at the data."
        if self._good is None:
            raise TrainingError(
                f"The loss of {task.name} became {value} at step {step} of {task.steps}, before there was a good "
                f"state to keep. {advice}"
            )
        self.network.load_state_dict(self._good[1], strict=False)
        warnings.warn(
            f"The loss of {task.name} became {value} at step {step} of {task.steps}; training stopped there, and "
            f"the state of step {self._good[0]} is used. {advice}",
            HQWarning,
            stacklevel=3,
        )

    def end(self) -> bool:
        """Leaves the network as it is to be scored; returns whether training came to its end."""
        task, keep, ended = self.task, self.task.checkpoint, not self.led_away
        # Mixed precision wraps the forward in place; what was trained is copied and scored as it was made.
        self.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
        self.network.eval()
        self._values.forget()
        if self._normalising.by_batch:
            agree_on_statistics(self.network, self.accelerator)
        if keep is not None and self.first < task.steps and ended:
            keep.keep(task.stage, task.steps, self.network, self._optimizer, task.history)
        # References in circles would keep the moments, twice the weights, until Python finds them.
        self._optimizer.state.clear()
        return ended


def _backward(accelerator: Accelerator, loss: Tensor) -> None:
    try:
        accelerator.backward(loss)
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise TrainingError(
                "The model's output has no gradient: its forward runs under torch.no_grad or detaches what it "
                "computes. Take that away for training."
            ) from error
        if "backward through the graph a second time" not in str(error):
            raise
        raise TrainingError(
            "The model keeps what it computed from a parameter from one forward to the next, and cannot train that "
            "parameter. Let its `train(True)` forget it, or pass train_float=False: only what is quantized then "
            "trains."
        ) from error


def _state(network: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of what training changes, for `load_state_dict(..., strict=False)`."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in [*trained.items(), *network.named_buffers()]}
