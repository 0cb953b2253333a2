"""The interface of a method that learns from calibration texts before it is used."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from topkbench.methods.base import AnyMethod, Geometry, IndexT, Policy, QueryT, TopKMethod

Progress = Callable[[int, int], None]
"""Called with the units of work done so far and the total."""

LayerStates = list[tuple[Tensor, Tensor]]
"""One layer's ``[Hq, m, d]`` queries and ``[Hkv, n, d]`` keys, for each calibration sequence."""

LossReport = Callable[[int, int, float], None]
"""Called after each training step with the steps done, the total and the step's loss."""

ArtifactSpec = dict[str, object]
"""The settings that identify an artifact."""


class CalibrationStates(Protocol):
    """Queries and keys of the texts a method is fitted on; no evaluation task uses these texts."""

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""

    @property
    def sequences(self) -> int:
        """Number of calibration sequences."""

    def states(self, layer: int) -> LayerStates:
        """Return one layer's post-RoPE queries and keys at all positions of each sequence."""


@dataclass(kw_only=True)
class LearningMethod(TopKMethod[IndexT, QueryT]):
    """A method that is fitted on a model before it is used.

    Attributes:
        fit_version: Version of ``fit_layer``; increased whenever it learns something else from
            the same states and settings. Artifacts of other versions are not used.
        artifact: What ``fit`` returned, once loaded.
        artifact_digest: Digest of the loaded artifact, empty without one.
    """

    fit_version: ClassVar[int] = 1

    artifact: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    artifact_digest: str = field(default="", init=False, repr=False)

    @abstractmethod
    def artifact_spec(self, geometry: Geometry) -> ArtifactSpec | None:
        """Return the settings that identify the artifact, or None if these settings learn nothing.

        They include ``fit_version``, so that each version of the fit has its own artifact.
        """

    @abstractmethod
    def artifact_layout(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the artifact's tensors; the first axis is the layer."""

    def query_positions(self, layer: int, lengths: Sequence[int]) -> list[list[int]]:
        """Return the positions in each sequence whose queries ``fit_layer`` reads; none by default.

        Only these are kept during calibration, as the queries of all positions need more memory
        than the keys.

        Args:
            layer: Index of the layer.
            lengths: Tokens of each calibration sequence.
        """
        return [[] for _ in lengths]

    @abstractmethod
    def fit_layer(
        self, layer: int, states: LayerStates, report: LossReport | None = None
    ) -> dict[str, Tensor]:
        """Fit one layer. Layers are independent: any order, several at a time.

        Args:
            layer: Index of the layer.
            states: For each sequence, the post-RoPE queries at ``query_positions``, in that order,
                and all keys; in the model's dtype, on the device that fits.
            report: Called with the loss after each training step, if there are steps.

        Returns:
            The artifact's tensors for this layer, on the CPU.
        """

    def fit(self, calibration: CalibrationStates) -> dict[str, Tensor]:
        """Fit every layer in turn from states in memory; return the artifact's tensors."""
        layers = {}
        for layer in range(calibration.num_layers):
            states = calibration.states(layer)
            positions = self.query_positions(layer, [keys.shape[1] for _, keys in states])
            needed = [
                (queries[:, at], keys)
                for (queries, keys), at in zip(states, positions, strict=True)
            ]
            layers[layer] = self.fit_layer(layer, needed)
        return stack_layers(layers, calibration.num_layers)

    def load_artifact(self, tensors: dict[str, Tensor], digest: str = "") -> None:
        """Load tensors that ``fit`` returned, in this process or an earlier one.

        Args:
            tensors: The artifact.
            digest: The artifact's digest, which is reported with the results.
        """
        self.artifact = dict(tensors)
        self.artifact_digest = digest

    def spec_of(self, geometry: Geometry, *settings: str) -> ArtifactSpec:
        """Return a spec of the method, its fit version, the model and the named settings."""
        named = {name: getattr(self, name) for name in settings}
        return {
            "method": self.name,
            "fit_version": self.fit_version,
            **geometry.identity,
            **named,
        }


AnyLearningMethod = LearningMethod[Any, Any]
"""Some method that learns, for callers that only pass its index back to it."""


def artifact_spec(method: AnyMethod, geometry: Geometry) -> ArtifactSpec | None:
    """Return the settings that identify a method's artifact, or None if it learns nothing."""
    return method.artifact_spec(geometry) if isinstance(method, LearningMethod) else None


def check_ready(method: AnyMethod, geometry: Geometry, policy: Policy | None = None) -> None:
    """Check that a method supports the model, and that the artifact it needs is loaded.

    Args:
        method: The method.
        geometry: The model's.
        policy: As ``resolve`` returned it; None to ask about the model alone.

    Raises:
        ValueError: With the reason, or with what the artifact must hold.
    """
    reason = method.unsupported_reason(geometry, policy)
    if reason is not None:
        raise ValueError(reason)
    if isinstance(method, LearningMethod) and method.artifact_spec(geometry) is not None:
        check_artifact(method, geometry, geometry.sparse_layers(policy))


def check_artifact(method: AnyLearningMethod, geometry: Geometry, layers: Sequence[int]) -> None:
    """Check that the artifact of a method that learns is loaded.

    Args:
        method: The method.
        geometry: The model's.
        layers: The layers in which the method selects.

    Raises:
        ValueError: With what the artifact must hold.
    """
    if not method.artifact:
        raise ValueError(
            f"{method.name} needs its artifact, and none is loaded; "
            "call load_artifact with a shipped one or with what fit returns."
        )
    for name, shape in method.artifact_layout(geometry).items():
        tensor = method.artifact.get(name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            actual = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(
                f"{method.name}'s artifact must hold {name} as torch.float32 {list(shape)} for"
                f" this model, got {actual}; fit it on this model."
            )
    for layer in layers:
        if not any(tensor[layer].any() for tensor in method.artifact.values()):
            raise ValueError(
                f"{method.name}'s artifact must hold what each layer in which it selects has"
                f" learned, and it has only zeros for layer {layer}; fit it on this model with the"
                " same window and dense_layers."
            )


def stack_layers(layers: Mapping[int, Mapping[str, Tensor]], num_layers: int) -> dict[str, Tensor]:
    """Stack what ``fit_layer`` returned into the artifact's tensors.

    Args:
        layers: The tensors of each fitted layer.
        num_layers: Layers of the model; those without a fit get zeros.
    """
    one = next(iter(layers.values()))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in one.items()}
    every = [layers.get(layer, zeros) for layer in range(num_layers)]
    return {name: torch.stack([layer[name] for layer in every]) for name in one}
