"""Importing the package costs nothing, and its networks are in timm's registry whichever comes first."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import epsanet

PUBLISHED = ["epsanet101_large", "epsanet101_small", "epsanet50_large", "epsanet50_small"]


def run(code: str) -> object:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_package_imports_no_large_library() -> None:
    loaded = run(
        "import epsanet, json, sys; epsanet.__version__; dir(epsanet);"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    assert isinstance(loaded, list)
    assert "epsanet" in loaded
    heavy = {"torch", "torchvision", "timm", "lightning", "numpy", "matplotlib", "sklearn", "rich", "jsonargparse"}
    assert not heavy & set(loaded)


AFTERWARDS = f"""
import json, sys, timm, torch
names = [n for n in {PUBLISHED} if timm.is_model(n) and timm.model_entrypoint(n).__module__.startswith("epsanet")]
with torch.device("meta"):
    parameters = sum(p.numel() for p in timm.create_model("epsanet50_small").parameters())
hooks = [type(f).__name__ for f in sys.meta_path if type(f).__module__.startswith("epsanet")]
print(json.dumps([names, parameters, hooks]))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import epsanet, timm",
        "import timm, epsanet",
        "import epsanet\nfrom timm.models import create_model",
        "import epsanet.network.psa\nimport timm.layers",
        "import epsanet, importlib.util\nimportlib.util.find_spec('timm.models')",
    ],
)
def test_the_networks_are_in_timms_registry_after_both_imports_in_any_order(imports: str) -> None:
    """And the hook that put them there is gone."""
    assert run(f"{imports}\n{AFTERWARDS}") == [PUBLISHED, 22_561_715, []]


def test_every_public_name_resolves_to_the_object_of_that_name() -> None:
    for name in epsanet.__all__:
        thing = getattr(epsanet, name)
        assert thing.__name__ == name
        assert thing.__module__.startswith("epsanet.")
        assert name in dir(epsanet)
    assert {"PSA", "SPC", "SEWeight", "EPSABlock", "EPSABasicBlock", "EPSANet", "psa_replace"} <= set(epsanet.__all__)


def test_a_name_that_does_not_exist_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'PSAA'"):
        _ = epsanet.PSAA
