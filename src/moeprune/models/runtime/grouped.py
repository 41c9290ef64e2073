"""Weights of few bits in groups: the storage of every rounding that gives a group of weights one scale and one zero.

A matrix [O, I] has groups of ``group_size`` neighbouring weights of one row, the last group of a row shorter where I is
no multiple; ``w = (code - zero) * scale``, with scale and zero in float16. Codes of any width from 1 to 8 bits lie one
after the other, the first in the lowest bits: 3 bits take 3 bits; a row ends with a whole byte.
"""

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDEST = 8


def pack(codes_ON: Tensor, bits: int) -> Tensor:
    """Codes (uint8, below 2^bits) without gaps: uint8 [O, ceil(N * bits / 8)]."""
    rows, count = codes_ON.shape
    codes_in_word, bytes_in_word = _word(bits)
    words = -(-count // codes_in_word)
    codes_OWP = F.pad(codes_ON, (0, words * codes_in_word - count)).view(rows, words, codes_in_word)
    packed_OWB = codes_ON.new_zeros(rows, words, bytes_in_word)
    for place in range(codes_in_word):
        byte, shift = divmod(place * bits, 8)
        packed_OWB[..., byte] |= codes_OWP[..., place] << shift
        if shift + bits > 8:
            packed_OWB[..., byte + 1] |= codes_OWP[..., place] >> (8 - shift)
    return packed_OWB.flatten(1)[:, : -(-count * bits // 8)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` codes of each row of what `pack` gave: uint8 [O, N]."""
    codes_in_word, bytes_in_word = _word(bits)
    rows, words = len(packed), -(-count // codes_in_word)
    packed_OWB = F.pad(packed, (0, words * bytes_in_word - packed.shape[1])).view(rows, words, bytes_in_word)
    codes_OWP = packed.new_empty(rows, words, codes_in_word)
    for place in range(codes_in_word):
        byte, shift = divmod(place * bits, 8)
        codes_OWP[..., place] = packed_OWB[..., byte] >> shift
        if shift + bits > 8:
            codes_OWP[..., place] |= packed_OWB[..., byte + 1] << (8 - shift)
    return codes_OWP.bitwise_and_(2**bits - 1).flatten(1)[:, :count]


def dequantise(codes_ON: Tensor, scales_OG: Tensor, zeros_OG: Tensor, group_size: int) -> Tensor:
    """``(code - zero) * scale`` of codes that are not packed, computed in float32 [O, N]."""
    whole = codes_ON.shape[1] // group_size
    weight_ON = codes_ON.float()
    groups_OGN = weight_ON[:, : whole * group_size].unflatten(1, (whole, group_size))
    shorter_ON = weight_ON[:, whole * group_size :]
    groups_OGN.sub_(zeros_OG[:, :whole, None].float()).mul_(scales_OG[:, :whole, None].float())
    shorter_ON.sub_(zeros_OG[:, whole:].float()).mul_(scales_OG[:, whole:].float())
    return weight_ON


class GroupedWeight(nn.Module):
    """A matrix [rows, columns] in groups. ``rounding`` is how its codes were found: "nearest", "hqq", "gptq".

    ``scales`` and ``zeros`` hold the bits of float16 numbers as int16, so that nothing that changes the precision of a
    model rounds them; ``dtype`` is what ``weight`` is computed in, and follows the model's.

    Raises ValueError for bits or a group size that cannot be.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(
        self, rows: int, columns: int, bits: int, group_size: int, rounding: str, device: Any = None, dtype: Any = None
    ) -> None:
        nn.Module.__init__(self)
        if not 1 <= bits <= WIDEST or group_size < 1:
            raise ValueError(f"codes of {bits} bits in groups of {group_size} are not possible")
        self.columns, self.bits, self.group_size, self.rounding = columns, bits, group_size, rounding
        self.dtype: torch.dtype = dtype or torch.get_default_dtype()
        packed, groups = -(-columns * bits // 8), -(-columns // group_size)
        self.register_buffer("codes", torch.zeros(rows, packed, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(rows, groups, dtype=torch.int16, device=device))
        self.register_buffer("zeros", torch.zeros(rows, groups, dtype=torch.int16, device=device))

    @property
    def storage(self) -> dict[str, Any]:
        """What must be known beside its tensors to read it."""
        return {"bits": self.bits, "group_size": self.group_size, "rounding": self.rounding}

    @property
    def weight(self) -> Tensor:
        """The dequantised matrix, computed anew each time: changing it changes nothing."""
        return self.dequantised(self.dtype)

    def dequantised(self, dtype: torch.dtype, rows: Tensor | slice = slice(None)) -> Tensor:
        """The matrix, or some rows of it, rounded once to ``dtype``."""
        codes = unpack(self.codes[rows], self.bits, self.columns)
        scales, zeros = self.scales[rows].view(torch.float16), self.zeros[rows].view(torch.float16)
        return dequantise(codes, scales, zeros, self.group_size).to(dtype)

    def fill(self, codes_ON: Tensor, scales_OG: Tensor, zeros_OG: Tensor) -> None:
        """Give it unpacked codes, and scales and zeros in float16. Raises ValueError for those of another shape."""
        wanted = [(len(self.codes), self.columns), tuple(self.scales.shape), tuple(self.zeros.shape)]
        given = [tuple(tensor.shape) for tensor in (codes_ON, scales_OG, zeros_OG)]
        if wanted != given or {scales_OG.dtype, zeros_OG.dtype} != {torch.float16}:
            raise ValueError(f"codes, scales and zeros of shapes {wanted} in float16 were expected, not {given}")
        self.codes = pack(codes_ON, self.bits)
        self.scales = scales_OG.contiguous().view(torch.int16)
        self.zeros = zeros_OG.contiguous().view(torch.int16)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What moves and casts a module: ``dtype`` is cast as a weight would be."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        rows, columns = len(self.codes), self.columns
        return f"{rows}, {columns}, {self.rounding}, bits={self.bits}, group_size={self.group_size}"


class GroupedLinear(GroupedWeight, nn.Linear):  # type: ignore[override]
    """A linear layer whose weight is a `GroupedWeight`; computes in the precision of its inputs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        rounding: str,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        GroupedWeight.__init__(self, out_features, in_features, bits, group_size, rounding, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        values = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if values is None else nn.Parameter(values, requires_grad=False)  # type: ignore[assignment]

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
        outputs: Tensor = _Product.apply(inputs, self)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)


class GroupedEmbedding(GroupedWeight, nn.Embedding):  # type: ignore[override]
    """An embedding table that is a `GroupedWeight`; dequantises the rows that are looked up, in its own ``dtype``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group_size: int,
        rounding: str,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        GroupedWeight.__init__(self, num_embeddings, embedding_dim, bits, group_size, rounding, device, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, None

    def forward(self, ids: Tensor) -> Tensor:
        return self.dequantised(self.dtype, ids.flatten()).unflatten(0, ids.shape)


class TiedHead(nn.Module):
    """The output head that computes with the embedding table; it holds no tensors of its own."""

    def __init__(self, embedding: GroupedEmbedding) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list, so that its tensors do not count as the head's

    @property
    def weight(self) -> Tensor:
        """The dequantised table."""
        return self._embedding[0].weight

    def forward(self, inputs: Tensor) -> Tensor:
        return _Product.apply(inputs, self._embedding[0])


class _Product(torch.autograd.Function):
    """``x W^T``; for the gradient the matrix is dequantised again, and not kept until then."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, matrix: GroupedWeight) -> Tensor:
        ctx.matrix = matrix
        return F.linear(inputs, matrix.dequantised(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.matrix.dequantised(gradient.dtype), None


def grouped_linear(
    codes_OI: Tensor,
    scales_OG: Tensor,
    zeros_OG: Tensor,
    bias_O: Tensor | None,
    *,
    bits: int,
    group_size: int,
    rounding: str,
    dtype: torch.dtype,
) -> GroupedLinear:
    """A linear layer of codes (uint8, not packed) with scales and zeros in float16, on the codes' device.

    Raises ValueError where their shapes do not fit each other.
    """
    outputs, inputs = codes_OI.shape
    options: dict[str, Any] = {"device": codes_OI.device, "dtype": dtype}
    layer = GroupedLinear(inputs, outputs, bits, group_size, rounding, bias=bias_O is not None, **options)
    layer.fill(codes_OI, scales_OG, zeros_OG)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O.detach(), requires_grad=False)
    return layer.eval()


def grouped_embedding(
    codes_VH: Tensor,
    scales_VG: Tensor,
    zeros_VG: Tensor,
    *,
    bits: int,
    group_size: int,
    rounding: str,
    dtype: torch.dtype,
) -> GroupedEmbedding:
    """An embedding table of codes, as `grouped_linear`."""
    options: dict[str, Any] = {"device": codes_VH.device, "dtype": dtype}
    rows, columns = codes_VH.shape
    table = GroupedEmbedding(rows, columns, bits, group_size, rounding, **options)
    table.fill(codes_VH, scales_VG, zeros_VG)
    return table.eval()


def head_is_tied(model: Any) -> bool:
    """Whether the output head computes with the embedding table."""
    head = model.get_output_embeddings()
    if isinstance(head, TiedHead):
        return True
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return not names.isdisjoint(model.all_tied_weights_keys)


def put_embedding(model: Any, table: GroupedEmbedding) -> None:
    """Put the table into the place of a transformers model's embeddings; a head tied to them computes with it too."""
    if head_is_tied(model):
        model.set_output_embeddings(TiedHead(table))
        # Else transformers would tie them itself, which asks for a parameter.
        model._tied_weights_keys, model.all_tied_weights_keys = {}, {}
    model.set_input_embeddings(table)


def _word(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest run of codes that fills whole bytes."""
    shared = gcd(8, bits)
    return 8 // shared, bits // shared
