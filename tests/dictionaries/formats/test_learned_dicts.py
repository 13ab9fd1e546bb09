"""Files of Cunningham and others, which hold objects of their classes, against these classes' arithmetic in float64."""

import sys
from types import ModuleType

import pytest
import torch

from sae.dictionaries import source
from sae.dictionaries.bundle import load
from sae.dictionaries.dictionary import Dictionary
from sae.disk.foreign import read_torch
from sae.errors import InputError

D, F = 6, 12
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
MODULE = "autoencoders.learned_dict"


class Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centring():
    rotation = torch.linalg.qr(random(D, D, seed=5)).Q
    return {"center_trans": random(D, seed=6), "center_rot": rotation, "center_scale": torch.linspace(0.5, 2, D, dtype=torch.float64)}


def attributes(kind, seed=0, **change):
    found = {"encoder": random(F, D, seed=seed), "encoder_bias": random(F, seed=seed + 1), "n_feats": F, "activation_size": D}
    found |= {"norm_encoder": True} if kind == "TiedSAE" else {"decoder": random(F, D, seed=seed + 2)}
    return found | change


def save(file, objects):
    """Written where the classes are known, and read where they are not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    module = ModuleType(MODULE)
    names = {kind for kind, _ in objects}
    classes = {name: type(name, (Plain,), {"__module__": MODULE}) for name in names}
    module.__dict__.update(classes)
    sys.modules |= {"autoencoders": ModuleType("autoencoders"), MODULE: module}
    try:
        built = [classes[kind](**values) for kind, values in objects]
        single = file.name != "learned_dicts.pt"
        torch.save(built[0] if single else [(one, {"dict_size": F, "l1_alpha": i / 8}) for i, one in enumerate(built)], file)
    finally:
        del sys.modules["autoencoders"], sys.modules[MODULE]
    return file


def predict(kind, a, x):
    """`LearnedDict.predict` with the methods of the class."""
    rows = a["encoder"] if kind == "TiedSAE" else a["decoder"]
    rows = rows / rows.norm(dim=-1, keepdim=True)
    encoder = rows if a.get("norm_encoder") else a["encoder"]
    t, r, s = (a.get(name) for name in ("center_trans", "center_rot", "center_scale"))
    centred = x if t is None else torch.einsum("cu,bu->bc", r, x - t) * s
    acts = (torch.einsum("nd,bd->bn", encoder, centred) + a["encoder_bias"]).clamp(min=0)
    out = torch.einsum("nd,bn->bd", rows, acts)
    return acts, out if t is None else torch.einsum("cu,bc->bu", r, out / s) + t


def same(dictionary, expected, x=X):
    for found, wanted in zip((dictionary.encode(x), dictionary(x)), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "change"),
    [("TiedSAE", {}), ("TiedSAE", {"norm_encoder": False}), ("TiedSAE", centring()), ("UntiedSAE", {})],
    ids=["tied", "tied, rows as they are", "tied and centred", "untied"],
)
@pytest.mark.parametrize("name", ["learned_dicts.pt", "Pythia-70M-deduped-mlp-0.pt"])
def test_one_object(tmp_path, kind, change, name):
    values = attributes(kind, **change)
    file = save(tmp_path / name, [(kind, values)])
    same(Dictionary.load(file), predict(kind, values, X))
    assert Dictionary.load(file).site is None
    if name == "learned_dicts.pt":
        same(Dictionary.load(tmp_path), predict(kind, values, X))


@pytest.mark.parametrize(
    ("folder", "site", "centred"),
    [
        ("tied_residual_l2_r4", "resid_post.2", True),
        ("sweep_tied_mlpout_l1_r8", "mlp_out.1", True),
        ("tied_mlp_l3_r0.5", "mlp_act.3", False),
    ],
)
def test_a_sweep_of_which_one_is_named(tmp_path, folder, site, centred):
    kinds = ["TiedSAE", "TiedSAE", "UntiedSAE"]
    objects = [(kind, attributes(kind, seed=10 * i)) for i, kind in enumerate(kinds)]
    file = save(tmp_path / folder / "_9" / "learned_dicts.pt", objects)
    for ask in (Dictionary.load, load):
        with pytest.raises(
            InputError, match=r"holds 3 dictionaries \(0: dict_size 12, l1_alpha 0.0; 1: .*\); name one of them, such as .*/0$"
        ):
            ask(file)
    with pytest.raises(InputError, match="holds 3 dictionaries"):
        Dictionary.load(f"{file}/3")
    for i, (kind, values) in enumerate(objects):
        dictionary = Dictionary.load(f"{file}/{i}")
        mean = X.mean(-1, keepdim=True) if centred else 0
        acts, out = predict(kind, values, X - mean)
        same(dictionary, (acts, out + mean))
        assert dictionary.site == site
    crc = {source.weights_crc32(f"{file}/{i}", [Dictionary.load(f"{file}/{i}").parts()]) for i in range(3)}
    assert len(crc) == 3


def test_a_file_of_one_has_no_numbers(tmp_path):
    file = save(tmp_path / "learned_dicts.pt", [("UntiedSAE", attributes("UntiedSAE"))])
    with pytest.raises(InputError, match="found a single dictionary; leave out /0"):
        Dictionary.load(f"{file}/0")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("ReverseSAE", {}, "would run code out of the file"),
        ("TiedSAE", {"norm_encoder": None}, "expected norm_encoder of a TiedSAE in .* to be true or false, found None"),
        ("TiedSAE", {"temperature": 2.0}, "holds temperature, which may change what the dictionary computes"),
        ("TiedSAE", {"gain": torch.ones(F)}, "holds gain beside encoder, encoder_bias"),
        ("TiedSAE", {"encoder": random(F, D + 1, seed=1), "center_trans": random(D, seed=1)}, "expected center_trans in"),
        ("TiedSAE", centring() | {"center_scale": torch.zeros(D, dtype=torch.float64)}, "center_scale in .* holds 0"),
        ("UntiedSAE", {"decoder": random(F, D + 1, seed=1)}, "expected decoder in .* of shape"),
        ("UntiedSAE", {"encoder": random(F, D, seed=1) * torch.nan}, "encoder in .* holds NaN"),
    ],
)
@pytest.mark.parametrize("name", ["learned_dicts.pt", "one.pt"])
def test_what_is_not_understood(tmp_path, kind, change, message, name):
    file = save(tmp_path / name, [(kind, attributes("TiedSAE" if kind == "ReverseSAE" else kind, **change))])
    with pytest.raises(InputError, match=message) as error:
        Dictionary.load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[], [1], {"encoder": torch.ones(2)}, [({}, {})]])
def test_a_file_of_that_name_without_their_objects(tmp_path, value):
    torch.save(value, tmp_path / "learned_dicts.pt")
    with pytest.raises(InputError, match=r"expected objects with their settings, or one object, of autoencoders.learned_dict.TiedSAE"):
        Dictionary.load(tmp_path / "learned_dicts.pt")


def test_nothing_of_an_object_is_run(tmp_path):
    """A class may say how it is made; what comes out of the file has its attributes and nothing else."""
    file = save(tmp_path / "one.pt", [("TiedSAE", attributes("TiedSAE"))])
    record = read_torch(file, "an object", ("autoencoders.learned_dict.TiedSAE",))
    assert type(record).__name__ == "TiedSAE"
    assert set(vars(record)) == set(attributes("TiedSAE"))
    assert "autoencoders" not in sys.modules
    with pytest.raises(InputError, match=r"autoencoders.learned_dict.TiedSAE\), and reading that would run code"):
        read_torch(file, "an object")  # the class is known to this one reading alone
