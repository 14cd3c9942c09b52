"""The operators a training step spends its time in, each with a plain reference beside it.

Shape suffixes, here and in `tinylm.model`: ``B`` batch, ``T`` time (queries), ``S`` time (keys),
``H`` heads, ``D`` head dimension, ``C`` model width, ``F`` feed-forward width, ``V`` vocabulary,
``N = B * T``. So ``q_BHTD``, ``logits_NV``.

Which implementation runs is decided once per process in `tinylm.kernels.dispatch`, on a GPU by
what `prepare` has measured there; the environment variable ``TINYLM_KERNELS`` and a ``backend=``
argument override it.
"""

from tinylm.kernels.attention import causal_attention, document_starts
from tinylm.kernels.dispatch import Selection, fingerprint, selections
from tinylm.kernels.feed_forward import feed_forward
from tinylm.kernels.first_check import prepare
from tinylm.kernels.linear_cross_entropy import linear_cross_entropy
from tinylm.kernels.muon import muon_step
from tinylm.kernels.norm import layer_norm, rms_norm
from tinylm.kernels.projections import linear_residual, norm_linear
from tinylm.kernels.rotary import apply_rotary, norm_rotary, rotary_tables
from tinylm.kernels.swiglu import swiglu

__all__ = [
    "Selection",
    "apply_rotary",
    "causal_attention",
    "document_starts",
    "feed_forward",
    "fingerprint",
    "layer_norm",
    "linear_cross_entropy",
    "linear_residual",
    "muon_step",
    "norm_linear",
    "norm_rotary",
    "prepare",
    "rms_norm",
    "rotary_tables",
    "selections",
    "swiglu",
]
