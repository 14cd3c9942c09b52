"""Evaluations on a GPU of the same windows again and again, as a model learns.

The windows stay there, and a batch of them is captured as one CUDA graph, so that evaluating takes
a replay for each batch, and one wait for the sums at the end.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tinylm import graph
from tinylm.device import Device
from tinylm.evaluate import IGNORE, Evaluator, Totals, batch_size, windows
from tinylm.model import Transformer


class DeviceEvaluation:
    """`tinylm.evaluate.evaluate`, to be called again and again.

    Args:
        ids, seq_len, eos_id, unk_id, limit, device, prefix_only: see there.
        graphed: whether to capture a batch; the device has to be a GPU then.
        say: told why batches are not captured, when that turns out at the first.
    """

    def __init__(
        self,
        model: Transformer,
        ids: np.ndarray,
        *,
        seq_len: int,
        eos_id: int,
        unk_id: int | None,
        limit: int | None,
        device: Device,
        prefix_only: bool = True,
        graphed: bool,
        say: Callable[[str], None],
    ) -> None:
        self._model, self._graphed, self._say = model, graphed, say
        self._evaluator = Evaluator(model, unk_id, device, prefix_only)
        seq_len = min(seq_len, max(1, len(ids)))
        inputs, targets = windows(ids, seq_len, eos_id, limit)
        self._batches = -(-len(inputs) // batch_size(seq_len))
        where = device.torch_device
        self._x_NBT = self._batched(inputs, eos_id).to(where)
        self._y_NBT = self._batched(targets, IGNORE).to(where)
        self._batch = torch.zeros(1, dtype=torch.int64, device=where)  # the next one's number
        self._run: Callable[[], None] | None = None  # known at the first evaluation

    def _batched(self, windows_WT: np.ndarray, filling: int) -> Tensor:
        """Batches of equal shapes; the last is filled up."""
        count, seq_len = windows_WT.shape
        size = -(-count // self._batches)
        missing = self._batches * size - count
        filled = np.pad(windows_WT, ((0, missing), (0, 0)), constant_values=filling)
        return torch.from_numpy(filled.reshape(self._batches, size, seq_len))

    @torch.no_grad()
    def __call__(self) -> Totals:
        """Of the weights as they are now; the model's mode stays as it is."""
        training = self._model.training
        self._model.eval()
        if self._run is None:
            self._run = self.compute
            if self._graphed:
                self._run = graph.captured(self.compute, "evaluations", self._say)
        self._batch.zero_()
        self._evaluator.clear()
        for _ in range(self._batches):
            self._run()
        self._model.train(training)
        return self._evaluator.totals()

    def compute(self) -> None:
        """One batch, by operations of the device alone."""
        at = self._batch % self._batches  # warming up may go beyond the last
        x_BT, y_BT = (t.index_select(0, at).squeeze(0) for t in (self._x_NBT, self._y_NBT))
        self._evaluator.add(x_BT, y_BT)
        self._batch += 1
