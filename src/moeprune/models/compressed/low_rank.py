"""The layers of low-rank adapters, as PEFT's own custom modules: LoRA and DoRA on linear layers, LoRA on routers.

Symbols: weight W [O, I], factors A [r, I] and B [O, r], scale s = alpha / r, magnitude m [O].
LoRA (2106.09685): W + s B A. DoRA (2402.09353, equation 5): (m / n) (W + s B A), n_o = ||(W + s B A)_o|| of each row.
What they compute and how they are stored is PEFT's; that a matrix is quantised makes no difference here.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, distributed, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class AdaptedLinear(Linear):
    """A linear layer of any storage beside one LoRA or DoRA."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): CachedDora}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``W x + (m / n - 1) W d(x) + (m / n) s B A d(x)`` of a DoRA, and the bias; d is the dropout."""
        if self.merged or self.disable_adapters or not self.lora_variant:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.lora_variant
        dropout, layer = self.lora_dropout[adapter], self.get_base_layer()
        if self.training and not isinstance(dropout, nn.Identity):
            # In one product a quantised matrix is dequantised once, and none is kept for the gradient.
            dropped = dropout(x)
            result, base = layer(torch.cat([x, dropped])).chunk(2)
        else:
            dropped = x
            result = base = layer(x)
        if layer.bias is not None:
            base = base - layer.bias
        ratio_O = _ratio(self, adapter)
        narrow = self.lora_A[adapter](self._cast_input_dtype(dropped, ratio_O.dtype))
        output = result + (ratio_O - 1) * base + ratio_O * self.scaling[adapter] * self.lora_B[adapter](narrow)
        return output.to(result.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        _keep_in_float32(self, adapter_name)


class AdaptedRouter(ParamWrapper):
    """A router beside the LoRA of its weight; whoever asks it for more than its output gets the router's answer."""

    def forward(self, hidden: Tensor) -> Any:  # one argument, so that it is still seen to keep the contract of routers
        return super().forward(hidden)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        _keep_in_float32(self, adapter_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


_numbers = itertools.count()
_since_step: list[int] = []  # within `remembered_norms`: a number that changes with every step of an optimizer


@contextmanager
def remembered_norms() -> Iterator[None]:
    """Within the context the row norms of a DoRA that trains are computed once between two steps of the optimizer.

    Outside they are computed in every forward pass, because fused optimizers change parameters without telling by
    their versions; those of a DoRA that does not train are always computed once.
    """

    def forget(*_: object) -> None:
        _since_step[-1] = next(_numbers)

    hook = register_optimizer_step_post_hook(forget)
    _since_step.append(next(_numbers))
    try:
        yield
    finally:
        _since_step.pop()
        hook.remove()


class CachedDora(DoraLinearVariant):
    """What PEFT asks of a DoRA beside its forward pass; the row norms are computed no more often than they change.

    PEFT computes them in every forward pass, from W + s B A as a matrix of its own, although neither changes between
    two steps of the optimizer. The paper (section 4.3) takes n for a constant in the gradient, as is done here.
    """

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Give the layer its magnitudes: m = n, so that nothing changes before the first step."""
        magnitude = _Magnitude(fan_in_fan_out=False)
        module.lora_magnitude_vector[adapter_name] = magnitude
        module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        factor_rI = module.lora_A[adapter_name].weight
        if factor_rI.is_meta:
            start_O = factor_rI.new_empty(module.out_features)
        else:
            start_O = magnitude.norms(module, adapter_name).clone()
        magnitude.weight = nn.Parameter(start_O)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """``(m / n) (W + s B A)``, rounded once."""
        merged_OI = orig_weight + module.get_delta_weight(active_adapter)
        return (_ratio(module, active_adapter).unsqueeze(1) * merged_OI).to(orig_weight.dtype)


class _Magnitude(DoraLinearLayer):
    """The magnitudes m [O] of one DoRA, and the norms n [O] for the values that its factors have now."""

    def norms(self, module: Any, adapter: str) -> Tensor:
        """n [O] in the precision of the factors; 1 where a row is all zero, which PEFT would divide by."""
        with torch.inference_mode(False), torch.no_grad():
            watched = [module.lora_A[adapter].weight, module.lora_B[adapter].weight]
            trains = any(value.requires_grad for value in watched)
            # FSDP refills parameters in place, also without telling.
            if (trains and not _since_step) or distributed.is_initialized():
                return _row_norms(module, adapter)
            state = [(value._version, value.data_ptr()) for value in (*watched, *module.get_base_layer().parameters())]
            if self._cache_get("state", None) != (state, _since_step):
                self._cache_store("norms", _row_norms(module, adapter))
                self._cache_store("state", (state, list(_since_step)))
        norms_O: Any = self._cache_get("norms", None)
        return norms_O

    def train(self, mode: bool = True) -> "_Magnitude":
        """As any module: the norms do not depend on the mode."""
        self.training = mode
        return self


def _ratio(module: Any, adapter: str) -> Tensor:
    """m / n [O]."""
    magnitude = module.lora_magnitude_vector[adapter]
    return magnitude.weight / magnitude.norms(module, adapter)


def _keep_in_float32(module: Any, adapter: str) -> None:
    """New factors have the precision of the weight, in which steps smaller than 16 bits can tell would be lost."""
    for factors in (module.lora_A, module.lora_B):
        weight = factors[adapter].weight
        weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))


def _row_norms(module: Any, adapter: str) -> Tensor:
    """``n_o^2 = ||w_o||^2 + 2 s b_o . (A w_o) + s^2 b_o A A^T b_o^T``: neither B A nor its sum with W is ever made."""
    a_rI, b_Or = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    weight_OI = _weight(module.get_base_layer()).to(a_rI)
    scale = module.scaling[adapter]
    squares_O = torch.linalg.vector_norm(weight_OI, dim=1).square()
    squares_O += (b_Or * torch.addmm(2 * scale * (weight_OI @ a_rI.T), b_Or, scale**2 * (a_rI @ a_rI.T))).sum(dim=1)
    norms_O = squares_O.clamp(min=0).sqrt()
    return torch.where(norms_O > 0, norms_O, torch.ones_like(norms_O))


def _weight(layer: Any) -> Tensor:
    """W, dequantised where it is quantised."""
    if not isinstance(layer, Linear8bitLt) or layer.weight.is_floating_point():
        return dequantize_module_weight(layer)
    # PEFT's way loses the scales of a layer that has run on a CPU: the library moves them from the weight to the state.
    weight: Any = layer.weight
    scales_O = weight.SCB if layer.state.SCB is None else layer.state.SCB
    return weight.data * (scales_O.unsqueeze(1) / 127)
