"""The Attention Router: which mode each KV head runs, decided from the layer's key states."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from elasticore.checks import check_int
from elasticore.layout import Segments
from elasticore.router.pooling import pool_boundary
from elasticore.router.routing import Routing
from elasticore.router.sampling import GumbelSoftmax, Sampler

__all__ = ["AttentionRouter"]

_FUSED_ON = ("cuda",) if importlib.util.find_spec("triton") else ()
"""Devices with kernels for the whole decision; triton is imported for the first one only."""
_TASK_MLP = (nn.Linear, nn.SiLU, nn.Linear)
_ROUTER_MLP = (nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear)


class AttentionRouter(nn.Module):
    """Pools a layer's keys and sends every KV head to its retrieval or its sparse mode.

    A *task MLP* (d → m·d → d) reads the pooled keys of a head, a *router MLP* (d → m·d → d → 2)
    turns that into two logits, with SiLU between the linear layers. All heads of the layer share
    both. At d = 128 and m = 4 they hold 263,682 parameters.

    In training mode the decision is sampled at :attr:`temperature`; in evaluation mode it is the
    argmax of the logits, without noise, and a tie is sparse.

    Parameters
    ----------
    head_dim
        d, the size of a key.
    hidden_multiplier
        m, the hidden size as a multiple of ``head_dim``.
    boundary
        Tokens pooled at each end of a sequence; None pools all. See :func:`pool_boundary`.
    sampler
        How training samples; :class:`GumbelSoftmax` by default.
    by
        What decides as one: ``"head"``, or ``"layer"``, whose heads share the mean of their logits,
        and their noise.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    scale, shift
        float32 ``[Hkv, head_dim]``, buffers: what :meth:`calibrate` has made of pooled keys; None
        in a router as the paper has it, which reads them as they are.
    first_head
        The layer's KV head that the first head of ``keys`` is; 0 but in sequence parallelism.
    temperature
        τ, a plain float that a trainer sets at every step. It is a function of the step and not
        used in inference, so it is no part of the ``state_dict``.

    Notes
    -----
    Sections 3.1 and 3.2, Eqs. 10 and 11; calibration is ours. The MLPs run in their parameters'
    dtype under autocast too: a decision is discrete, and rounding the logits to bfloat16 would flip
    close ones.

    Inference without gradients on a GPU runs the same function as two kernel launches of the triton
    backend (:mod:`elasticore.backends.triton.router`), whose pooled keys have the same bits and
    whose logits differ from the modules' by rounding only. The modules run where triton is not
    installed, for ``boundary=None``, decisions by layer, other sizes or dtypes than the kernels',
    and for a router that is subclassed or has hooks on its layers or other layers in their place.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        head_dim: int,
        hidden_multiplier: int = 4,
        boundary: int | None = 100,
        sampler: Sampler | None = None,
        by: str = "head",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_int("head_dim", head_dim, 1)
        check_int("hidden_multiplier", hidden_multiplier, 1)
        check_int("boundary", boundary, 1, optional=True)
        if by not in ("head", "layer"):
            raise ValueError(f"by must be 'head' or 'layer', got {by!r}.")
        self.by = by
        self.head_dim = head_dim
        self.hidden_multiplier = hidden_multiplier
        self.boundary = boundary
        self.sampler: Sampler = GumbelSoftmax() if sampler is None else sampler
        self.temperature = 1.0
        self.first_head = 0
        self.register_buffer("scale", None)
        self.register_buffer("shift", None)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, device=device, dtype=dtype)

        hidden = hidden_multiplier * head_dim
        self.task_mlp = nn.Sequential(linear(head_dim, hidden), nn.SiLU(), linear(hidden, head_dim))
        self.router_mlp = nn.Sequential(
            linear(head_dim, hidden),
            nn.SiLU(),
            linear(hidden, head_dim),
            nn.SiLU(),
            linear(head_dim, 2),
        )

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide for every sequence and KV head.

        Parameters
        ----------
        keys
            Key states before rotary embedding, float ``[B, T, Hkv, head_dim]``, any strides.
        segments
            Where the sequences lie (:meth:`elasticore.SequenceLayout.segments`).

        Returns
        -------
        Routing
            With logits; with a gate in training mode only.

        Raises
        ------
        TypeError, ValueError
            If keys are not float ``[B, T, Hkv, head_dim]`` on the segments' device.
        """
        if keys.ndim == 4 and keys.shape[3] != self.head_dim:
            raise ValueError(
                f"keys have head_dim {keys.shape[3]} but this router was made for {self.head_dim}."
            )
        fused = self._fused(keys, segments)
        if fused is not None:
            return fused
        heads = keys.shape[2]
        logits = self.logits(pool_boundary(keys, segments, self.boundary))
        if self.by == "layer":
            logits = logits.mean(1, keepdim=True)
        if self.training:
            gate = self.sampler(logits, self.temperature).expand(-1, heads)
            decisions = (gate.detach() > 0.5).to(torch.int8)
            return Routing(decisions, logits.expand(-1, heads, -1), gate)
        logits = logits.expand(-1, heads, -1)
        sparse = logits.detach()[..., 1] >= logits.detach()[..., 0]
        return Routing(sparse.to(torch.int8), logits)

    def calibrate(self, pooled: Tensor) -> None:
        """Let every head read how its pooled keys differ from those of typical inputs.

        Pooled keys of a head are nearly the same for all inputs: in SmolLM2-135M their standard
        deviation over prompts is 5 to 13 % of the spread of their means. A router that reads them
        as they are sees the head, and hardly the input. Calibrated, it reads

        ``x' = (x - mean) / deviation + mean / spread``

        with mean and deviation over ``pooled``, for every head and dimension, and the spread of the
        means over the layer, which keeps heads apart.

        Parameters
        ----------
        pooled
            Pooled keys of typical inputs, float ``[inputs, Hkv, head_dim]``, at least two inputs.

        Raises
        ------
        ValueError
            On another shape, or values that are not finite.
        """
        if pooled.ndim != 3 or pooled.shape[0] < 2 or pooled.shape[2] != self.head_dim:
            raise ValueError(
                f"pooled must be [inputs, kv_heads, {self.head_dim}] with at least two inputs, got "
                f"{list(pooled.shape)}."
            )
        if not bool(pooled.isfinite().all()):
            raise ValueError("pooled must be finite; the model gives keys that are not.")
        x = pooled.detach().to(next(self.parameters()).device, torch.float32)
        mean, deviation = x.mean(0), x.std(0)
        deviation = deviation.clamp(min=0.1 * deviation.mean()).clamp(min=1e-6)
        spread = mean.std().clamp(min=1e-6)
        self.scale = 1 / deviation
        self.shift = mean * (1 / spread - 1 / deviation)

    def calibrated(self, pooled: Tensor) -> Tensor:
        """What the MLPs read of pooled keys ``[..., Hkv, head_dim]``."""
        if self.scale is None or self.shift is None:
            return pooled
        heads = slice(self.first_head, self.first_head + pooled.shape[-2])
        return pooled.to(self.scale.dtype) * self.scale[heads] + self.shift[heads]

    def task_representation(self, pooled: Tensor) -> Tensor:
        """Output of the task MLP (what Figure 5 compares): float32 ``[..., Hkv, head_dim]``.

        Parameters
        ----------
        pooled
            Pooled keys ``[..., Hkv, head_dim]``, from :func:`pool_boundary`.
        """
        return _run(self.task_mlp, self.calibrated(pooled))

    def logits(self, pooled: Tensor) -> Tensor:
        """Logits of pooled keys ``[..., Hkv, head_dim]``: float32 ``[..., Hkv, 2]``.

        Column 0 is retrieval, column 1 sparse.
        """
        return _run(self.router_mlp, self.task_representation(pooled))

    def _fused(self, keys: Tensor, segments: Segments) -> Routing | None:
        """The decision from the GPU kernels, or None where the modules have to run."""
        if (
            self.training
            or self.by == "layer"
            or self.boundary is None
            or keys.device.type not in _FUSED_ON
            or not isinstance(segments, Segments)
            or segments.row.device != keys.device
        ):
            return None
        parameters = _parameters(self)
        if parameters is None:
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in (keys, *parameters)):
            return None
        from elasticore.backends.triton import router as kernels

        calibration: list[Tensor] = []
        if self.scale is not None and self.shift is not None:
            heads = slice(self.first_head, self.first_head + keys.shape[2])
            calibration = [self.scale[heads], self.shift[heads]]
        if not kernels.supports(keys, self.boundary, parameters, calibration):
            return None
        return Routing(*kernels.route(keys, segments, self.boundary, parameters, calibration))

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return (
            f"head_dim={self.head_dim}, hidden_multiplier={self.hidden_multiplier}, "
            f"boundary={self.boundary}, sampler={self.sampler}, by={self.by}"
        )


def _parameters(router: AttentionRouter) -> list[Tensor] | None:
    """Weights and biases, in order; None if the router is not as it was made.

    Code that was put in a module's place, or hooked to it, wants to be called.
    """
    task, router_mlp = router.task_mlp, router.router_mlp
    modules = [task, router_mlp, *task._modules.values(), *router_mlp._modules.values()]
    types = [AttentionRouter, nn.Sequential, nn.Sequential, *_TASK_MLP, *_ROUTER_MLP]
    if [type(router), *map(type, modules)] != types:
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    parameters: list[Tensor] = [p for m in modules for p in m._parameters.values() if p is not None]
    return parameters if len(parameters) == 10 else None


def _run(mlp: nn.Module, x: Tensor) -> Tensor:
    """In the parameters' dtype; whatever may stand in the place of the linear layers."""
    dtype = next((p.dtype for p in mlp.parameters() if p.is_floating_point()), torch.float32)
    if not torch.amp.is_autocast_available(x.device.type):
        return mlp(x.to(dtype)).float()
    with torch.autocast(x.device.type, enabled=False):
        return mlp(x.to(dtype)).float()
