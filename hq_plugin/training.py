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
    by_batch = bool(task.batch_statistics)
    set_training_modes(network, by_batch)
    kept = KeptValues(network)
    # Batches of a step, as accelerate is configured.
    accumulated = accelerator.gradient_accumulation_steps
    batches = task.data.forever(2 * accelerator.num_processes)
    ahead = next(batches)
    samples = ahead.size * accumulated
    batches = itertools.chain([ahead], batches)
    del ahead
    groups = task.rates.groups(task.network, network, samples, rises=task.batch_statistics is None)
    # One pass over weights and moments in place of a dozen, where torch has the kernel.
    trained, pieces = [p for group in groups for p in group["params"]], sharded()
    fused = all(p.device.type in _FUSED_ADAM and p.is_floating_point() for p in trained) and not pieces
    optimizer = torch.optim.Adam(groups, fused=fused)
    schedule = task.rates.schedule(optimizer, task.steps, lambda: by_batch)
    if pieces:
        wrapped, optimizer = network, accelerator.prepare_optimizer(optimizer)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch renames `broadcast_buffers`, accelerate not yet
            wrapped, optimizer = accelerator.prepare(network, optimizer)
        for buffer in network.buffers():
            broadcast(buffer)  # in place; the processes' own may differ in their last bits
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    distance = task.distance or task.loss
    far = task.batch_statistics is None and batch_statistics_pay(network, teacher, task.data, distance, accelerator)
    seen, began = math.ceil(SEEN * task.steps), None
    if task.backs_off and seen >= TELLING and task.data.holdout[0].size >= accelerator.num_processes:
        began = held_out_distance(network, teacher, task.data, distance, accelerator)
    first, keep = 0, task.checkpoint
    if keep is not None:
        first, task.history[:] = keep.restore(task.stage, network, optimizer)
        if task.history and task.history[-1].get("led_away", False):
            return False
        if not by_batch and task.history and task.history[-1].get("batch_statistics", False):
            by_batch = True
            follow_batches(network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch minds a schedule that moves before the optimizer
            for _ in range(first if first < task.steps else 0):  # a stage that is done needs no data
                for _ in range(accumulated):
                    next(batches)
                schedule.step()
    good: tuple[int, dict[str, Tensor]] | None = None
    every = max(1, task.steps // SNAPSHOTS)
    watched = BlockOutputs(task.blocks if task.block_loss else ())
    with (
        progress(task.show) as bars,
        watched.watching(network, teacher, task.data.holdout[0].to(accelerator.device)) as blocks,
    ):
        bar = bars.task(task.name, total=task.steps)
        bar.advance(first)
        for step in range(first, task.steps):
            if step == seen and (far or began is not None):
                kept.forget()
                with blocks.resting():
                    measure = network, teacher, task.data, distance, accelerator
                    if far and batch_statistics_pay(*measure):
                        by_batch = True
                        follow_batches(network)
                    elif began is not None and not held_out_distance(*measure) < LED_AWAY * began:
                        task.history[-1]["led_away"] = True
                        if keep is not None:
                            keep.keep(task.stage, step, network, optimizer, task.history)
                        break
            task.before_step(network, step)
            block_loss = task.block_loss_at(step)
            value = 0.0
            for part in range(accumulated):
                with nullcontext() if part == accumulated - 1 else accelerator.no_sync(wrapped):
                    kept.forget()
                    batch, weight = share_of_batch(next(batches).to(accelerator.device))
                    with accelerator.autocast(), nullcontext() if block_loss else blocks.resting():
                        with torch.no_grad():
                            target = batch.run(teacher)
                        loss = task.loss(batch.run(wrapped), target)
                        if block_loss and blocks.names:
                            loss = loss + block_loss * blocks.distance(batch)
                        loss = loss * weight
                    # The mean over processes, so that all of them see the same and stop together.
                    value += float(accelerator.reduce(loss.detach(), "mean")) / accumulated
                    if math.isfinite(value):
                        _backward(accelerator, loss)  # which divides by `accumulated`
            if not math.isfinite(value):
                _stop_at(task, step, value, network, good, samples)
                break
            # Only now is it known that the state is good.
            if good is None or step % every == 0:
                good = None  # first, so that two are never in memory
                good = (step, _state(network))
            accelerator.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()  # gradients are as large as the weights: the next forward has them not beside it
            schedule.step()
            task.history.append({"step": step, "loss": value, "batch_statistics": by_batch})
            track(task.name, step, loss=value, learning_rate=float(schedule.get_last_lr()[0]))
            bar.advance(loss=value)
            if keep is not None:
                due = torch.tensor([float(keep.due()), float(stop.wanted)], device=accelerator.device)
                # The processes' clocks differ: they keep a state together or not at all.
                keeps, stops = accelerator.reduce(due).tolist()
                if keeps or stops:
                    keep.keep(task.stage, step + 1, network, optimizer, task.history)
                if stops:
                    raise interrupted(f"{task.name}, after step {step + 1} of {task.steps}", keep.directory)
    # Mixed precision wraps the forward in place; what was trained is copied and scored as it was made.
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    network.eval()
    kept.forget()
    ended = not task.history[-1].get("led_away", False)
    if by_batch:
        agree_on_statistics(network, accelerator)
    if keep is not None and first < task.steps and ended:
        keep.keep(task.stage, task.steps, network, optimizer, task.history)
    # References in circles would keep the moments, twice the weights, until Python finds them.
    optimizer.state.clear()
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


def _stop_at(
    task: Task,
    step: int,
    value: float,
    network: nn.Module,
    good: tuple[int, dict[str, Tensor]] | None,
    samples: int,
) -> None:
    """Goes back to the last good state after a loss that is not finite."""
    advice = f"Lower learning_rate (now {task.rates.told(samples)}) or look at the data."
    if good is None:
        raise TrainingError(
            f"The loss of {task.name} became {value} at step {step} of {task.steps}, before there was a good "
            f"state to keep. {advice}"
        )
    network.load_state_dict(good[1], strict=False)
    warnings.warn(
        f"The loss of {task.name} became {value} at step {step} of {task.steps}; training stopped there, and "
        f"the state of step {good[0]} is used. {advice}",
        HQWarning,
        stacklevel=3,
    )
