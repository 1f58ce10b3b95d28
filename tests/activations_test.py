import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import snnk_jax as snnk
from snnk_jax.activations import Activation, Atom
from snnk_jax.testing import tolerance

Z = np.concatenate([np.linspace(-6, 6, 101), [0.0]])


def tanh_gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


REFERENCES = {
    "cos": np.cos,
    "gelu": lambda z: z * scipy.special.ndtr(z),
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "sin": np.sin,
    "tanh": np.tanh,
}


def softsign(z):
    return z / (1 + jnp.abs(z))


def test_every_name_has_a_reference():
    assert set(snnk.activations.names()) == set(REFERENCES)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_values(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        z = jnp.asarray(Z, dtype)
        value = snnk.activations.get(name)(z)
        assert value.dtype == z.dtype
        expected = REFERENCES[name](np.asarray(z, np.float64))
        np.testing.assert_allclose(
            np.asarray(value, np.float64), expected, **tolerance(dtype)
        )


@pytest.mark.parametrize(
    ("name", "parameters", "reference"),
    [
        ("cos", {"a": 0.8, "b": 1.5, "c": 0.4}, lambda z: 0.8 * np.cos(1.5 * z + 0.4)),
        ("sin", {"a": 0.8, "b": 1.5, "c": 0.4}, lambda z: 0.8 * np.sin(1.5 * z + 0.4)),
        ("sin", {"b": -2.0}, lambda z: np.sin(-2 * z)),
        ("gelu", {"approximate": True}, tanh_gelu),
        ("gelu", {"approximate": False}, REFERENCES["gelu"]),
    ],
)
def test_parameters(name, parameters, reference):
    with jax.enable_x64(True):
        value = snnk.activations.get(name, **parameters)(jnp.asarray(Z))
        np.testing.assert_allclose(value, reference(Z), **tolerance("float64"))


@pytest.mark.parametrize("name", REFERENCES)
def test_atoms_are_the_function(name):
    row = snnk.activations.get(name)
    assert bool(row.atoms) == (name in ("cos", "sin"))
    if row.atoms:
        value = sum(a.amplitude * np.cos(a.frequency * Z + a.phase) for a in row.atoms)
        np.testing.assert_allclose(value, REFERENCES[name](Z), atol=1e-14)


@pytest.mark.parametrize("name", REFERENCES)
def test_degree_is_that_of_homogeneity(name):
    degree = snnk.activations.get(name).degree
    f = REFERENCES[name]
    homogeneous = np.allclose(f(3 * Z), 3 * f(Z))
    assert degree == (1 if homogeneous else None)


@pytest.mark.parametrize("name", REFERENCES)
def test_rows_hash_by_value(name):
    row = snnk.activations.get(name)
    assert snnk.activations.get(name) == row
    assert hash(snnk.activations.get(name)) == hash(row)
    assert snnk.activations.get(row) is row
    assert dataclasses.replace(row, name="other") != row


def test_waves_hash_by_value():
    row = snnk.activations.get("sin", a=2.0, b=3.0)
    assert row == snnk.activations.get("sin", a=2.0, b=3.0)
    for twin in (copy.deepcopy(row), pickle.loads(pickle.dumps(row))):
        assert twin == row
        assert hash(twin) == hash(row)
    assert row != snnk.activations.get("sin", a=2.0, b=3.5)
    assert row.atoms == (Atom(3.0, 2.0, -np.pi / 2),)
    assert snnk.activations.get("gelu", approximate=True) != snnk.activations.get(
        "gelu"
    )


def test_user_functions():
    row = snnk.activations.get(softsign)
    assert row == Activation("softsign", softsign)
    assert row == snnk.activations.get(softsign)
    assert (row.atoms, row.degree) == ((), None)
    assert float(row(jnp.array(1.0))) == 0.5


def test_gradients_are_finite():
    for name in snnk.activations.names():
        grad = jax.vmap(jax.grad(snnk.activations.get(name)))(jnp.asarray(Z, "float32"))
        assert np.isfinite(grad).all()


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"must be one of .*gelu.*Did you mean 'gelu'"):
        snnk.activations.get("gellu")
    with pytest.raises(ValueError, match=r"Got 'qqq'\.$"):
        snnk.activations.get("qqq")
    with pytest.raises(ValueError, match=r"parameters must be those of cos.*'d'"):
        snnk.activations.get("cos", d=1.0)
    with pytest.raises(ValueError, match="parameters must come with a name"):
        snnk.activations.get(softsign, a=1.0)
    with pytest.raises(ValueError, match="a name, an Activation or a function. Got 3"):
        snnk.activations.get(3)
    with pytest.raises(ValueError, match="fn must be callable. Got 3"):
        Activation("three", 3)
