"""A DDPG agent with one action in [0, 1], as HAQ has it (Lillicrap et al., arXiv:1509.02971).

Hyper-parameters are those of HAQ's published code (mit-han-lab/haq, `rl_quantize.py` and `lib/rl/ddpg.py`): two
hidden layers of 300, Adam at 1e-4 (actor) and 1e-3 (critic), batches of 64 from the last 128 episodes, targets
moved by 1 %, truncated normal noise of 0.5 that decays by 1 % an episode after the warm-up, rewards less a moving
average of the batches' means, no discount.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

HIDDEN, BATCH, TARGET_RATE = 300, 64, 0.01
ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
NOISE, NOISE_DECAY, BASELINE_RATE = 0.5, 0.99, 0.5
#: Episodes that are remembered.
MEMORY = 128


@dataclass(frozen=True)
class Transition:
    """One step of an episode; `after` is None at its end."""

    state: NDArray[np.float32]
    action: float
    reward: float
    after: NDArray[np.float32] | None


class Agent:
    """Actor and critic.

    Args:
        features: Length of a state.
        layers: Steps of an episode.
        warmup: Episodes of random actions, after which learning begins.
        seed: Of the weights and of what is random.
    """

    def __init__(self, features: int, layers: int, warmup: int, seed: int) -> None:
        self.rng = np.random.RandomState(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = nn.Sequential(_layers(features), nn.Sigmoid())
            self.critic = _layers(features + 1)
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), ACTOR_RATE)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), CRITIC_RATE)
        self.memory: deque[Transition] = deque(maxlen=MEMORY * layers)
        self.warmup, self.episodes = warmup, 0
        self.baseline: float | None = None

    @torch.no_grad()
    def act(self, state: NDArray[np.float32]) -> float:
        """Returns a noisy action, 0 to 1."""
        if self.episodes < self.warmup:
            return float(self.rng.rand())
        mean = self.actor(torch.from_numpy(state)).item()
        spread = NOISE * NOISE_DECAY ** (self.episodes - self.warmup)
        for _ in range(100):  # a normal distribution, cut off at the ends
            action = self.rng.normal(mean, spread)
            if 0 <= action <= 1:
                return float(action)
        return mean

    def learn(self, states: list[NDArray[np.float32]], actions: list[float], reward: float) -> None:
        """Ends an episode: every step of it gets the reward, and after each a batch is learned from."""
        afters = [*states[1:], None]
        self.episodes += 1
        for state, action, after in zip(states, actions, afters, strict=True):
            self.memory.append(Transition(state, action, reward, after))
            if self.episodes > self.warmup:
                self._update()

    def _update(self) -> None:
        chosen = [self.memory[i] for i in self.rng.randint(len(self.memory), size=BATCH)]
        state = torch.from_numpy(np.stack([t.state for t in chosen]))
        action = torch.tensor([[t.action] for t in chosen], dtype=torch.float32)
        reward = torch.tensor([[t.reward] for t in chosen], dtype=torch.float32)
        mean = reward.mean().item()
        self.baseline = mean if self.baseline is None else self.baseline + BASELINE_RATE * (mean - self.baseline)
        reward -= self.baseline
        goes_on = torch.tensor([[float(t.after is not None)] for t in chosen])
        after = torch.from_numpy(np.stack([t.state if t.after is None else t.after for t in chosen]))
        with torch.no_grad():
            following = self.target_critic(torch.cat([after, self.target_actor(after)], 1))
            goal = reward + goes_on * following
        critic_loss = F.mse_loss(self.critic(torch.cat([state, action], 1)), goal)
        _step(self.critic_optimizer, critic_loss)
        actor_loss = -self.critic(torch.cat([state, self.actor(state)], 1)).mean()
        _step(self.actor_optimizer, actor_loss)
        with torch.no_grad():
            for target, network in ((self.target_actor, self.actor), (self.target_critic, self.critic)):
                for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
                    slow.lerp_(fast, TARGET_RATE)


def _layers(features: int) -> nn.Sequential:
    last = nn.Linear(HIDDEN, 1)
    nn.init.uniform_(last.weight, -3e-3, 3e-3)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), last)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
