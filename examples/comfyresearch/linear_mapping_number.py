"""The linear mapping number as an Observable of ComfyResearch (https://github.com/MetaCircleAI/ComfyResearch).

ComfyResearch takes observables as files of its checkout, as its page "Add a scalar Observable" says:

    pip install .                                      # in lmnfast's checkout, into ComfyResearch's environment
    cp linear_mapping_number.py CHECKOUT/comfy_research/nodes/definitions/observables/
    npm --prefix CHECKOUT/frontend run generate:node-manifest      # and then build the frontend

The node has two fields: how many of the training's first samples are measured, and from which layer on (a name of
`model.named_modules()`, or "inputs"). For tokens name the embedding. A network that cannot be measured has NaN, with a warning
that says why. ComfyResearch is before its first release, and its interface may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_research.nodes.registry import observable_def, recorder_for
from comfy_research.nodes.schema import FrontendSpec, IntField, ObservableDef, SpawnSpec, StringField, VizSpec

if TYPE_CHECKING:
    from comfy_research.engine.trainer.recorder import ObservableRecorder
    from comfy_research.schemas.graph import Node

LINEAR_MAPPING_NUMBER = observable_def(
    ObservableDef(
        type="observable_linear_mapping_number",
        label="Linear mapping number",
        hint="How far the network is from linear on these samples: 1 if it is affine. It grows with their number.",
        viz=VizSpec(
            variant="user",
            title="Linear mapping number",
            info_markdown=(
                "**Linear mapping number**: 2 to the entropy, in bits, of the normalised eigenvalues of the matrix that says "
                "for each pair of samples how straight the outputs are along the path between them."
            ),
            spawns=True,
            user_whitelisted=True,
            spawn=SpawnSpec(kind="user_scalar", unit="LMN"),
        ),
        fields=(
            IntField(key="samples", label="Samples", default=100, min=2),
            StringField(key="layer", label="From layer", default="inputs"),
        ),
        frontend=FrontendSpec(),
    )
)


@recorder_for(LINEAR_MAPPING_NUMBER)
def record(rec: ObservableRecorder, on: Node) -> None:
    """Appends the linear mapping number of the model as it is, measured in eval mode on the same samples each time."""
    import warnings

    import lmnfast

    data = on.data or {}
    samples = rec.x_t[: int(data.get("samples", 100))]
    try:
        value = lmnfast.lmn(*lmnfast.cut(rec.model, str(data.get("layer", "inputs")), samples)).item()
    except (TypeError, ValueError, RuntimeError) as error:
        warnings.warn(f"linear mapping number: {error}", stacklevel=2)
        value = float("nan")
    rec.observable_metric_histories[on.id].append(value)
