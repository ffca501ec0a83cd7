"""What a program costs: FLOPs, bytes, parameters, and what ranks send each other. Two FLOPs per multiply-add.

Of a graph or a module, from its shapes; nothing is run. Of a transformer of equal blocks also on a mesh, in closed form: `transformer_of` takes its
sizes from a graph and accepts them only where the closed form gives the graph's own count.

B rows, L tokens, S text tokens, D width, N heads, K head dim. Meshes divide L by cp = ulysses * ring, and N and the block's matrices by tp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from operator import getitem
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from reelstep.compiler.graphs import weights_of
from reelstep.errors import CompileError
from reelstep.kernels import OPS
from reelstep.kernels.op import NAMESPACE
from reelstep.parallel.context import ring_attention
from reelstep.parallel.mesh import Mesh

aten = torch.ops.aten
Shape = tuple[int, ...]
Kind = Literal["product", "convolution", "attention", "pointwise"]


@dataclass(frozen=True)
class Op:
    """`count` equal operators of one device. elements: what each reads and writes, weights included, every tensor once."""

    kind: Kind
    flops: float
    elements: float
    count: int = 1


def module_flops(module: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of one forward. On the meta device nothing is computed or allocated, so a 30B model takes seconds."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(*inputs)
    return int(counter.get_total_flops())


def graph_parameters(exported: ExportedProgram) -> int:
    """Elements of all parameters that the graph reads; a shared one counts once."""
    weights = weights_of(exported)
    tensors = {weights[name].data_ptr() or name: weights[name] for name in exported.graph_signature.parameters}
    return sum(tensor.numel() for tensor in tensors.values())


def graph_flops(exported: ExportedProgram, rows: int = 1) -> int:
    """FLOPs of one call with `rows` rows, from the shapes in the graph. Matrix products, convolutions and attention count, the rest is noise."""
    return sum(FORMULAS[node.target](node, rows) for node in exported.graph.nodes if node.target in FORMULAS)


def graph_ops(exported: ExportedProgram, rows: int = 1) -> tuple[Op, ...]:
    """The operators of one call. What lies between products is counted as compiled backends run it: each connected piece is one pass over memory.

    An op of ours is a piece of its own: where a graph has kept it, the call cannot be fused with what stands beside it.
    """
    heavy = [node for node in exported.graph.nodes if node.target in FORMULAS]
    counted = Counter(Op(KINDS[node.target], FORMULAS[node.target](node, rows), _elements([*node.all_input_nodes, node], rows)) for node in heavy)
    counted.update(Op("pointwise", 0, _elements(piece, rows)) for piece in _fused(exported))
    return tuple(Op(op.kind, op.flops, op.elements, count) for op, count in counted.items())


def _fused(exported: ExportedProgram) -> Iterator[list[Node]]:
    """For each piece of connected pointwise operators with no product between them: the tensors that enter it and those that leave it."""
    depth: dict[Node, int] = {}  # products on the longest way there
    piece_of: dict[Node, list[Node]] = {}  # one list for all of a piece
    for node in exported.graph.nodes:
        sources = [_base(source) for source in node.all_input_nodes]
        depth[node] = max((depth[source] + (source.target in FORMULAS) for source in sources), default=0)
        if not _is_pointwise(node):
            continue
        piece = piece_of[node] = [node]
        for source in sources:
            other = piece_of.get(source, piece)
            if other is not piece and depth[source] == depth[node] and not _is_ours(source) and not _is_ours(node):
                piece += other
                piece_of.update(dict.fromkeys(other, piece))
    for piece in {id(piece): piece for piece in piece_of.values()}.values():
        members = set(piece)
        entering = dict.fromkeys(source for node in piece for source in map(_base, node.all_input_nodes) if source not in members)
        yield [*entering, *(node for node in piece if any(user not in members for user in _users(node)))]


def _base(node: Node) -> Node:
    """The node whose memory this one shows."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _users(node: Node) -> Iterator[Node]:
    """Who reads a node's memory, through views too."""
    for user in node.users:
        if _is_view(user):
            yield from _users(user)
        else:
            yield user


def _is_view(node: Node) -> bool:
    target: Any = node.target
    if target is getitem:
        return _is_view(node.all_input_nodes[0])
    if not isinstance(target, OpOverload):
        return False
    returns = target._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _is_pointwise(node: Node) -> bool:
    """Reductions, gathers and copies too: all that moves memory and is no product."""
    return isinstance(node.target, OpOverload) and node.target not in FORMULAS and not _is_view(node) and bool(_tensors(node))


def _is_ours(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == NAMESPACE


def _tensors(node: Node) -> list[Tensor]:
    """What a node gives: one tensor, several of an op with several, or none."""
    return [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]


def _elements(nodes: list[Node], rows: int) -> int:
    return sum(prod(_sizes(value, rows)) for node in nodes for value in _tensors(node))


def shape_of(node: Any, rows: int) -> Shape:
    """The sizes of a node's tensor with the batch set to `rows`: the batch is the only symbol that a graph has."""
    return _sizes(node.meta["val"], rows)


def _sizes(value: Tensor, rows: int) -> Shape:
    return tuple(_number(size, rows) for size in value.shape)


def _number(size: int | torch.SymInt, rows: int) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, rows)))


def _product(left: int) -> Callable[[Node, int], int]:
    """A matrix product whose left operand is argument `left`: every output element sums over its last size."""
    return lambda node, rows: 2 * prod(shape_of(node, rows)) * shape_of(node.args[left], rows)[-1]


def _convolution(node: Node, rows: int) -> int:
    """Every output element (input element, if transposed) meets one kernel of weight[0]."""
    transposed = node.target in TRANSPOSED or (node.target is aten.convolution.default and bool(node.args[6]))
    positions = shape_of(node.args[0] if transposed else node, rows)
    return 2 * prod(positions) * prod(shape_of(node.args[1], rows)[1:])


def _attention(node: Node, rows: int) -> int:
    """Scores and weighted sum. query [..., L, K], key [..., S, K], value [..., S, V]."""
    query, key, value = (shape_of(argument, rows) for argument in node.args[:3])
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _ring(node: Node, rows: int) -> int:
    """One rank's queries to the keys of all stages, of which it holds one stage's at a time; their lengths are argument 4."""
    lengths: Any = node.args[4]
    return 4 * prod(shape_of(node.args[0], rows)) * int(sum(lengths))


TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)

FORMULAS: dict[Any, Callable[[Node, int], int]] = {
    **dict.fromkeys((aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default), _product(0)),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _product(1)),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default, *TRANSPOSED), _convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _convolution),
    **dict.fromkeys((aten.scaled_dot_product_attention.default, OPS["attention"].overload), _attention),
    ring_attention._opoverload: _ring,
}

KINDS: dict[Any, Kind] = {
    target: "attention" if formula in (_attention, _ring) else "convolution" if formula is _convolution else "product" for target, formula in FORMULAS.items()
}


Axis = Literal["ulysses", "ring", "tp", "state"]


@dataclass(frozen=True)
class Transfer:
    """What one rank sends over one axis in one network call. rounds: messages that wait for each other. `state`: latents and velocities from and to rank 0."""

    axis: Axis
    bytes: float
    rounds: int


def ulysses_bytes(tokens: float, width: float, element_bytes: float, ranks: int) -> float:
    """Sent by one of P ranks for one attention: all-to-all of q, k, v and the output, of each of which it keeps 1/P. Jacobs et al. 2023, arXiv:2309.14509."""
    return 4 * tokens * width * element_bytes * (ranks - 1) / ranks**2


def ring_bytes(tokens: float, width: float, element_bytes: float, ranks: int) -> float:
    """Sent by one of P ranks for one attention: a block of keys and one of values, P - 1 times. Liu et al. 2023, arXiv:2310.01889."""
    return 2 * (ranks - 1) * (tokens / ranks) * width * element_bytes


def all_reduce_bytes(tensor_bytes: float, ranks: int) -> float:
    """Sent by one of P ranks: reduce-scatter, then all-gather, each of (P - 1)/P of the tensor."""
    return 2 * tensor_bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Transformer:
    """A denoiser of equal blocks: self-attention, attention to text, feed-forward. Sizes of one row. Biases, norms and modulation are left out: noise."""

    layers: int
    width: int
    heads: int
    ffn: int
    gated: bool  # three matrices (SwiGLU), else two
    tokens: int
    text_tokens: int  # 0: no attention to text
    values_in: int  # of one token, into the first product
    values_out: int
    qk_norm: bool  # queries and keys are normed or rotated: a pass over each

    @property
    def block_parameters(self) -> int:
        """Of all blocks: what tp divides."""
        attentions = 2 if self.text_tokens else 1
        return self.layers * (4 * attentions * self.width**2 + (3 if self.gated else 2) * self.width * self.ffn)

    @property
    def branches(self) -> int:
        """Residual branches of a block; each ends in a product whose partial sums tp has to add."""
        return 3 if self.text_tokens else 2

    def flops(self, rows: int = 1) -> float:
        return sum(op.flops * op.count for op in self.ops(rows))

    def ops(self, rows: int = 1, mesh: Mesh | None = None) -> tuple[Op, ...]:
        """Of one rank in one call with `rows` rows, each a rank's own. Text is not divided by cp: every rank needs all of its keys."""
        at = mesh or Mesh.parse("")
        d, f, n = self.width, self.ffn, self.layers
        tokens, text = rows * self.tokens / at.cp, rows * self.text_tokens
        column = _matrix(tokens, d, d / at.tp)
        row = _matrix(tokens, d / at.tp, d)
        whole = 2 * rows * self.tokens * (d / at.tp) / at.ulysses  # keys and values that pass a rank, on the ring a block at a time
        ops = [
            Op("product", *_matrix(tokens, self.values_in, d)),
            Op("product", *column, 3 * n),
            Op("attention", 4 * tokens * self.tokens * d / at.tp / at.ring, 2 * tokens * d / at.tp + whole / at.ring, n * at.ring),
            Op("product", *row, n),
            Op("product", *_matrix(tokens, d, f / at.tp), (2 if self.gated else 1) * n),
            Op("product", *_matrix(tokens, f / at.tp, d), n),
            Op("product", *_matrix(tokens, d, self.values_out)),
            Op("pointwise", 0, 5 * tokens * d, n),  # add the last branch, norm and modulate: reads x, branch, positions; writes x, input
            Op("pointwise", 0, (3 if self.gated else 2) * tokens * f / at.tp, n),
            Op("pointwise", 0, 4 * tokens * d, n),  # the same before the feed-forward, without positions
        ]
        if self.text_tokens:
            ops += [
                Op("product", *column, n),
                Op("product", *_matrix(text, d, d / at.tp), 2 * n),
                Op("attention", 4 * tokens * self.text_tokens * d / at.tp, 2 * (tokens + text) * d / at.tp, n),
                Op("product", *row, n),
                Op("pointwise", 0, 3 * tokens * d, n),
            ]
        if at.ring > 1:
            ops.append(Op("pointwise", 0, 3 * tokens * d / at.tp, n * (at.ring - 1)))  # merge two partial attentions
        if self.qk_norm:
            both = 4 * tokens + (2 * tokens + 2 * text if self.text_tokens else 0)
            ops.append(Op("pointwise", 0, both * d / at.tp, n))
        return tuple(ops)

    def transfers(self, rows: int, mesh: Mesh, element_bytes: float) -> tuple[Transfer, ...]:
        """What one rank sends in one call with `rows` rows of its own. Empty for one device."""
        at, n, tokens = mesh, self.layers, rows * self.tokens
        found = []
        if at.ulysses > 1:
            sent = ulysses_bytes(tokens / at.ring, self.width / at.tp, element_bytes, at.ulysses)
            found.append(Transfer("ulysses", n * sent, 4 * n))
        if at.ring > 1:
            sent = ring_bytes(tokens, self.width / (at.tp * at.ulysses), element_bytes, at.ring)
            found.append(Transfer("ring", n * sent, (at.ring - 1) * n))
        if at.tp > 1:
            sent = all_reduce_bytes(tokens / at.cp * self.width * element_bytes, at.tp)
            found.append(Transfer("tp", n * self.branches * sent, n * self.branches * 2 * (at.tp - 1)))
        if at.world > 1:
            found.append(Transfer("state", 4 * tokens * (self.values_in + self.values_out), 2))  # float32
        return tuple(found)

    def activation_bytes(self, rows: int, mesh: Mesh, element_bytes: float) -> float:
        """The most that one rank holds beside weights: x and a branch in float32, and the larger of an attention with its buffers and a feed-forward."""
        tokens = rows * self.tokens / mesh.cp
        stream = 2 * tokens * self.width * 4
        part = tokens * self.width / mesh.tp * element_bytes
        received = 4 * part if mesh.ulysses > 1 else 0
        waiting = 2 * part + tokens * self.width / mesh.tp * 4 if mesh.ring > 1 else 0  # the next block of keys and values, and a float32 output to merge
        attention = tokens * self.width * element_bytes + 4 * part + received + waiting
        feed = tokens * (self.width + (3 if self.gated else 2) * self.ffn / mesh.tp) * element_bytes
        text = 3 * rows * self.text_tokens * self.width * element_bytes
        return stream + max(attention, feed) + text + 4 * rows * self.tokens * (self.values_in + self.values_out)


def _matrix(rows: float, inner: float, outer: float) -> tuple[float, float]:
    """FLOPs and elements of [rows, inner] x [inner, outer]."""
    return 2 * rows * inner * outer, rows * inner + inner * outer + rows * outer


def transformer_of(exported: ExportedProgram) -> Transformer:
    """The sizes of a denoiser's graph. Raises CompileError for one whose FLOPs are not those of such a transformer: another kind of network."""
    nodes = list(exported.graph.nodes)
    attentions = [node for node in nodes if FORMULAS.get(node.target) is _attention]
    if not attentions:
        raise CompileError("the graph has no attention; sizes can be read of a transformer only")
    to_itself = [node for node in attentions if _input_of(node.args[0]) is _input_of(node.args[1])]
    to_text = [node for node in attentions if node not in to_itself]
    _, heads, tokens, head_dim = shape_of(attentions[0].args[0], 1)
    width, layers = heads * head_dim, len(to_itself)
    sizes = [(shape_of(node.args[0], 1)[-1], shape_of(node, 1)[-1]) for node in nodes if node.target is aten.linear.default and shape_of(node, 1)[-2] == tokens]
    inner = Counter(sizes[1:-1])
    ffn = max((i for i, o in inner if o == width and i != width), key=lambda i: inner[i, width], default=width)
    found = Transformer(
        layers=layers,
        width=width,
        heads=heads,
        ffn=ffn,
        gated=inner[width, ffn] == 2 * layers,
        tokens=tokens,
        text_tokens=shape_of(to_text[0].args[1], 1)[-2] if to_text else 0,
        values_in=sizes[0][0],
        values_out=sizes[-1][1],
        qk_norm=any(_is_pointwise(node) for node in _chain(attentions[0].args[0])),
    )
    counted, closed = graph_flops(exported), found.flops()
    if abs(counted - closed) > 1e-9 * counted:
        raise CompileError(f"the graph has {counted:.6g} FLOPs a row, and {closed:.6g} if read as {found}; only a transformer of equal blocks can be planned")
    return found


def _chain(node: Any) -> Iterator[Node]:
    """From a query or key back to the product that made it, which is the last; to the graph's edge where none did."""
    yield node
    while node.target is not aten.linear.default and node.all_input_nodes:
        reader, node = node, node.all_input_nodes[0]
        yield node
        if node.target is OPS["qk_norm_rope"].overload:  # takes queries and keys side by side, and gives them so
            node = node.args[reader.args[1]]
            yield node


def _input_of(node: Any) -> Node:
    """What the product that made a query or key was given."""
    *_, last = _chain(node)
    return last.all_input_nodes[0] if last.all_input_nodes else last
