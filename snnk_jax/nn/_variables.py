"""Variable types: a parameter's role is its type."""

from flax import nnx


class RandomProjection(nnx.Variable):
    """Frozen randomness of a feature map: never trained, saved with the adapter."""


class InputStatistic(nnx.Variable):
    """Measured on samples of a module's inputs: never trained, saved with it."""


class AdapterParam(nnx.Param):
    """A parameter that an adapter adds to a model.

    ``nnx.split(model, AdapterParam, ...)`` selects exactly what adapter training
    changes.
    """


# The collection name Linen users see through `nnx.bridge.to_linen`.
nnx.register_variable_name("random_projection", RandomProjection)
nnx.register_variable_name("input_statistic", InputStatistic)
nnx.register_variable_name("adapter_param", AdapterParam)
