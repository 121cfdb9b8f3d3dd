"""Importing the package costs nothing, and its networks are in timm's registry whichever comes first."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import epsanet

PUBLISHED = ["epsanet101_large", "epsanet101_small", "epsanet50_large", "epsanet50_small"]


def run(code: str) -> list[object]:
    """What a fresh interpreter prints as JSON, each line."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_importing_the_package_imports_no_large_library() -> None:
    (loaded,) = run(
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
EXPECTED = [PUBLISHED, 22_561_715, []]

OTHERS = (
    "import timm, epsanet",
    "import epsanet\nfrom timm.models import create_model",
    "import epsanet.network.psa\nimport timm.layers",
    "import epsanet, importlib.util\nimportlib.util.find_spec('timm.models')",
)
FORKED = f"""
import os, sys, torch, torchvision
assert not sys.modules.keys() & {{"epsanet", "timm"}}
for imports in {OTHERS}:
    child = os.fork()
    if not child:
        exec(imports + {AFTERWARDS!r})
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, imports
"""


def test_the_networks_are_in_timms_registry_after_both_imports() -> None:
    """And the hook that put them there is gone."""
    assert run(f"import epsanet, timm\n{AFTERWARDS}") == [EXPECTED]


def test_the_order_of_the_imports_makes_no_difference() -> None:
    """Each in a child of one process, which has imported what takes long and is none of the two."""
    assert run(FORKED) == [EXPECTED] * len(OTHERS)


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
