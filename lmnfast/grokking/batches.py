"""Which samples an update of the training takes, if not all."""

from typing import Any

import torch


class Batches:
    """The batches of a training, without end. Those of one epoch are consecutive parts of one permutation of the samples; what
    does not fill a batch at its end is left out in this epoch.

    Args:
        samples: the number of all samples.
        size: the number of samples of a batch.
        generator: draws the permutations, on the CPU.
        device: of the batches.

    Attributes:
        chosen: (size,) int64, the samples of the batch. It keeps its memory.
    """

    def __init__(self, samples: int, size: int, generator: torch.Generator, device: str) -> None:
        self.samples, self.generator = samples, generator
        self.chosen = torch.arange(size, device=device)
        self._draw()

    def _draw(self) -> None:
        self._drawn_from = self.generator.get_state()
        order = torch.randperm(self.samples, generator=self.generator)
        whole = self.samples // len(self.chosen) * len(self.chosen)
        self._parts = order[:whole].to(self.chosen.device).split(len(self.chosen))
        self._taken = 0

    def advance(self) -> None:
        """Goes to the next batch."""
        if self._taken == len(self._parts):
            self._draw()
        self.chosen.copy_(self._parts[self._taken])
        self._taken += 1

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from."""
        return {"drawn_from": self._drawn_from, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues behind the batch at which `state_dict` was called.

        Raises:
            Exception: the content is not that of `state_dict`.
        """
        self.generator.set_state(state["drawn_from"].cpu())
        self._draw()
        if type(state["taken"]) is not int or not 0 <= state["taken"] <= len(self._parts):
            raise ValueError(f"expected 0 to {len(self._parts)} batches as taken, got {state['taken']!r}")
        self._taken = state["taken"]
