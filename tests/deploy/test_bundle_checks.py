"""Bundles from strangers: each way to do harm is refused in one line, in a process with little memory and time."""

from __future__ import annotations

import io
import json
import pickle
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from epsanet.deploy.export import Exported

Spoil = Callable[[Path, Path], None]
"""Takes the folder of a sound bundle and the path of a file that must not come into being."""

KINDS: dict[str, tuple[str, Spoil, str]] = {}
"""Name to format, what is done to the bundle, and what the message must say."""


def kind(form: str, message: str) -> Callable[[Spoil], Spoil]:
    def add(spoil: Spoil) -> Spoil:
        KINDS[spoil.__name__] = form, spoil, message
        return spoil

    return add


# ----------------------------------------------------------------------------------------------------------------- ONNX


def change_onnx(folder: Path, change: Callable[[Any], None]) -> None:
    import onnx

    model = onnx.load(folder / "network.onnx")
    change(model)
    (folder / "network.onnx").write_bytes(model.SerializeToString())


def put_before_all(model: Any, nodes: list[Any], result: str) -> None:
    """Add what ``nodes`` compute to the images, so that it cannot be left out."""
    from onnx import helper

    for node in model.graph.node:
        node.input[:] = ["spoiled" if name == "images" else name for name in node.input]
    for node in reversed([*nodes, helper.make_node("Add", ["images", result], ["spoiled"])]):
        model.graph.node.insert(0, node)


@kind("onnx", "external data")
def weights_in_another_file(folder: Path, _: Path) -> None:
    def change(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        tensor.external_data.add(key="location", value="../../../../../../etc/passwd")

    change_onnx(folder, change)


@kind("onnx", "it is a link")
def network_that_is_a_link(folder: Path, _: Path) -> None:
    network = folder / "network.onnx"
    network.rename(folder / "elsewhere.onnx")
    network.symlink_to("elsewhere.onnx")


@kind("onnx", "cut short")
def onnx_cut_short(folder: Path, _: Path) -> None:
    content = (folder / "network.onnx").read_bytes()
    (folder / "network.onnx").write_bytes(content[: len(content) // 2])


@kind("onnx", "absurd dimensions")
def tensor_of_a_terabyte(folder: Path, _: Path) -> None:
    def change(model: Any) -> None:
        model.graph.initializer[0].dims[:] = [1 << 20, 1 << 18]

    change_onnx(folder, change)


@kind("onnx", "less or more than its dimensions")
def tensor_without_its_numbers(folder: Path, _: Path) -> None:
    def change(model: Any) -> None:
        model.graph.initializer[0].dims[0] *= 2

    change_onnx(folder, change)


@kind("onnx", "absurd dimensions")
def map_of_a_terabyte(folder: Path, _: Path) -> None:
    def change(model: Any) -> None:
        from onnx import helper, numpy_helper

        model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 19, 3, 1 << 10, 1 << 10]), "size"))
        put_before_all(
            model,
            [
                helper.make_node("ConstantOfShape", ["size"], ["large"]),
                helper.make_node("ReduceSum", ["large"], ["small"], keepdims=0),
            ],
            "small",
        )

    change_onnx(folder, change)


@kind("onnx", "control flow")
def endless_loop(folder: Path, _: Path) -> None:
    def change(model: Any) -> None:
        from onnx import TensorProto, helper, numpy_helper

        body = helper.make_graph(
            [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("go", "value")],
            "body",
            [
                helper.make_tensor_value_info("turn", TensorProto.INT64, []),
                helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                helper.make_tensor_value_info("value", TensorProto.FLOAT, []),
            ],
            [
                helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
                helper.make_tensor_value_info("value_out", TensorProto.FLOAT, []),
            ],
        )
        for name, value in (("turns", np.array(1 << 60)), ("yes", np.array(True)), ("start", np.float32(0))):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        put_before_all(model, [helper.make_node("Loop", ["turns", "yes", "start"], ["end"], body=body)], "end")

    change_onnx(folder, change)


@kind("onnx", "operators of other makers")
def operator_of_another_maker(folder: Path, _: Path) -> None:
    def change(model: Any) -> None:
        model.graph.node[0].domain = "evil"
        model.opset_import.add(domain="evil", version=1)

    change_onnx(folder, change)


@kind("onnx", "no ONNX file")
def words_for_a_network(folder: Path, _: Path) -> None:
    (folder / "network.onnx").write_text("These are words.\n" * 100)


# ------------------------------------------------------------------------------------------------------------- OpenVINO


def change_ir(folder: Path, pattern: str, replacement: str) -> None:
    path = folder / "network.xml"
    text, count = re.subn(pattern, replacement, path.read_text(), count=1)
    assert count == 1
    path.write_text(text)


@kind("openvino", "network.bin is missing")
def ir_without_weights(folder: Path, _: Path) -> None:
    (folder / "network.bin").unlink()


@kind("openvino", "and the network uses")
def ir_with_too_many_weights(folder: Path, _: Path) -> None:
    with (folder / "network.bin").open("ab") as file:
        file.write(bytes(4096))


@kind("openvino", "beyond the end")
def ir_with_too_few_weights(folder: Path, _: Path) -> None:
    path = folder / "network.bin"
    path.write_bytes(path.read_bytes()[:-64])


@kind("openvino", "absurd dimensions")
def ir_with_a_constant_of_a_terabyte(folder: Path, _: Path) -> None:
    change_ir(folder, r'shape="\d+, \d+, 3, 3"', 'shape="1048576, 262144, 1, 1"')


@kind("openvino", "declares entities")
def ir_whose_entities_multiply(folder: Path, _: Path) -> None:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    path = folder / "network.xml"
    text = re.sub(r"<\?xml.*?\?>", "", path.read_text())
    path.write_text(f'<?xml version="1.0"?><!DOCTYPE net [<!ENTITY e0 "ha">{entities}]>{text}')


# ------------------------------------------------------------------------------------------------------------------ pt2


def change_pt2(folder: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    path = folder / "network.pt2"
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def only(members: dict[str, bytes], end: str) -> str:
    (name,) = (name for name in members if name.endswith(end))
    return name


class Touch:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@kind("pt2", "could run code")
def pickle_for_an_example(folder: Path, canary: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        file = io.BytesIO()
        import torch

        torch.save(Touch(canary), file)
        members[only(members, "sample_inputs/model.pt")] = file.getvalue()

    change_pt2(folder, change)


@kind("pt2", "pickled weights")
def pickle_for_a_weight(folder: Path, canary: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        name = only(members, "weights/model_weights_config.json")
        config = json.loads(members[name])
        entry = next(iter(config["config"].values()))
        entry["use_pickle"] = True
        members[next(other for other in members if other.endswith(entry["path_name"]))] = pickle.dumps(Touch(canary))
        members[name] = json.dumps(config).encode()

    change_pt2(folder, change)


@kind("pt2", "could run code")
def code_for_a_size(folder: Path, canary: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        name = only(members, "models/model.json")
        text, count = re.subn(
            rb'"expr_str": ?"[^"]*"',
            b"\"expr_str\": \"__import__('pathlib').Path('%s').touch()\"" % str(canary).encode(),
            members[name],
            count=1,
        )
        assert count == 1
        members[name] = text

    change_pt2(folder, change)


def change_size(folder: Path, expression: str) -> None:
    def change(members: dict[str, bytes]) -> None:
        name = only(members, "models/model.json")
        text, count = re.subn(rb'"expr_str": ?"[^"]*"', f'"expr_str": "{expression}"'.encode(), members[name], count=1)
        assert count == 1
        members[name] = text

    change_pt2(folder, change)


@kind("pt2", "or without end")
def number_that_takes_a_pattern_without_end(folder: Path, _: Path) -> None:
    change_size(folder, "1" * 60 + "!")


@kind("pt2", "or without end")
def power_of_powers(folder: Path, _: Path) -> None:
    change_size(folder, "9**9**9**9")


@kind("pt2", "or without end")
def power_in_words(folder: Path, _: Path) -> None:
    change_size(folder, "Pow(Integer(9), Integer(999999999))")


@kind("pt2", "only torch's own operators")
def call_of_another_function(folder: Path, _: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        name = only(members, "models/model.json")
        members[name] = members[name].replace(b"torch.ops.aten.relu.default", b"os.system", 1)
        members[name] = members[name].replace(b"torch.ops.aten.relu_.default", b"os.system", 1)
        assert b"os.system" in members[name]

    change_pt2(folder, change)


@kind("pt2", "which no plain network needs")
def library_in_the_archive(folder: Path, _: Path) -> None:
    change_pt2(folder, lambda members: members.update({"model/data/aotinductor/model/x.so": b"\x7fELF"}))


# ---------------------------------------------------------------------------------------------------------- bundle.json


def change_description(folder: Path, **changes: Any) -> None:
    path = folder / "bundle.json"
    description = json.loads(path.read_text())
    description |= {key: value for key, value in changes.items() if key != "data_config"}
    description["data_config"] |= changes.get("data_config", {})
    path.write_text(json.dumps(description))


@kind("onnx", "input_size=")
def input_of_a_million_pixels_a_side(folder: Path, _: Path) -> None:
    change_description(folder, data_config={"input_size": [3, 1 << 20, 1 << 20]})


@kind("onnx", "mean=")
def words_for_numbers(folder: Path, _: Path) -> None:
    change_description(folder, data_config={"mean": ["a", "b", "c"]})


@kind("onnx", "format '../../x' is none of")
def format_that_is_a_path(folder: Path, _: Path) -> None:
    change_description(folder, format="../../x")


@kind("onnx", "format ['onnx'] is none of")
def format_that_is_a_list(folder: Path, _: Path) -> None:
    change_description(folder, format=["onnx"])


@kind("onnx", "is damaged")
def description_nested_without_end(folder: Path, _: Path) -> None:
    (folder / "bundle.json").write_text("[" * 200_000)


@kind("onnx", "not one of 9 classes an image")
def names_of_other_classes(folder: Path, _: Path) -> None:
    change_description(folder, label_names=[str(number) for number in range(9)])


# ---------------------------------------------------------------------------------------------------------------- tests

CHILD = """
import contextlib, io, json, sys
from epsanet import cli
image, *folders = sys.argv[1:]
for folder in folders:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main(["predict", folder, image])
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**24,) * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process as Linux has them")
def test_every_kind_of_harm_is_refused_in_one_line(bundles: dict[str, Exported], tmp_path: Path) -> None:
    canary, image = tmp_path / "canary", tmp_path / "image.png"
    Image.new("RGB", (20, 20), "teal").save(image)
    folders = {name: tmp_path / name for name in KINDS}
    for name, (form, spoil, _) in KINDS.items():
        shutil.copytree(bundles[form].folder, folders[name])
        spoil(folders[name], canary)
    sound = [str(exported.folder) for exported in bundles.values()]
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(image), *map(str, folders.values()), *sound],
        capture_output=True,
        text=True,
        preexec_fn=limited,
        timeout=240,
    )
    answers = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    assert len(answers) == len(KINDS) + len(sound), run.stderr[-2000:]
    for (name, (_, _, message)), (code, said) in zip(KINDS.items(), answers, strict=False):
        lines = said.splitlines()
        assert code == 2, name
        assert len(lines) == 1, (name, lines)
        assert message in lines[0], name
    assert [code for code, _ in answers[len(KINDS) :]] == [0] * len(sound)
    assert not canary.exists()
    assert len(KINDS) >= 14
