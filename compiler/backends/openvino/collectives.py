"""Collectives inside OpenVINO's graph: an operator of ours that OpenVINO calls with the memory of its neighbours, and torch.distributed runs.

A rank's graph is so one engine and not pieces between collectives. OpenVINO lets operators of Python take part in a model, but not in a saved one.
"""

from __future__ import annotations

from typing import Any

import openvino as ov
import torch
from openvino.frontend.pytorch import ConversionExtension

from reelstep.parallel.collectives import Communicator, c10d, communicator_of

RUNS = {
    f"_c10d_functional.{op._overloadpacket.__name__}.default": op
    for op in (c10d.all_reduce.default, c10d.all_gather_into_tensor.default, c10d.all_to_all_single.default)
}
"""The operators by the frontend's names. A ring is none of them: it overlaps what travels with what is computed, and is always a cut."""
WAIT = "_c10d_functional.wait_tensor.default"


class Raised:
    """What went wrong in a collective: OpenVINO hands on that something did, as text."""

    error: Exception | None = None

    def take(self) -> Exception | None:
        error, self.error = self.error, None
        return error


class ReelstepCollective(ov.Op):  # type: ignore[misc]  # openvino has no types for it
    """One collective of a graph: of its first input, after the collective that its second one comes from.

    args: those of torch's functional operator behind its tensor, the group's name last.
    """

    def __init__(self, inputs: Any, op: Any, args: tuple[Any, ...], comm: Communicator, raised: Raised) -> None:
        super().__init__(self)
        self.op, self.args, self.comm, self.raised = op, args, comm, raised
        self.set_arguments(inputs)
        self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        shape = self.get_input_partial_shape(0)
        if self.op is c10d.all_gather_into_tensor.default:
            shape[0] = ov.Dimension(shape[0].get_length() * self.args[0]) if shape[0].is_static else ov.Dimension()
        elif self.op is c10d.all_to_all_single.default:
            shape[0] = ov.Dimension(sum(self.args[0]))
        self.set_output_type(0, self.get_input_element_type(0), shape)

    def clone_with_new_inputs(self, inputs: Any) -> ReelstepCollective:
        return ReelstepCollective(inputs, self.op, self.args, self.comm, self.raised)

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: Any, inputs: Any) -> bool:
        try:
            self.comm.run_into(self.op, (torch.from_numpy(inputs[0].data), *self.args), torch.from_numpy(outputs[0].data))
        except Exception as error:  # noqa: BLE001  # it cannot pass through OpenVINO; whoever called the engine raises it
            self.raised.error = error
            return False
        return True

    def visit_attributes(self, visitor: Any) -> bool:
        return True


def has_collectives(model: ov.Model) -> bool:
    return any(node.get_type_name() == ReelstepCollective.__name__ for node in model.get_ops())


def conversions(raised: Raised) -> list[ConversionExtension]:
    """How the frontend is to convert the collectives of one graph over this process's links, of which each group must be there."""
    # Ranks must meet in one order, and a compiler may move what does not depend on each other: so each depends on the one before it.
    before: list[Any] = []

    def collective(op: Any) -> Any:
        def convert(context: Any) -> list[Any]:
            x, *others = (context.get_input(i) for i in range(context.get_input_size()))
            *args, group = (_constant(context, i, value) for i, value in enumerate(others, 1))
            made = ReelstepCollective([x, *before], op, (*args, group), communicator_of(group), raised).output(0)
            before[:] = [made]
            return [made]

        return convert

    return [ConversionExtension(WAIT, lambda context: [context.get_input(0)]), *(ConversionExtension(name, collective(op)) for name, op in RUNS.items())]


def _constant(context: Any, position: int, value: Any) -> Any:
    """An argument that is no tensor; words come as bytes."""
    if value.get_element_type() == ov.Type.u8:
        return bytes(value.get_node().data).decode()
    return context.get_values_from_const_input(position)
