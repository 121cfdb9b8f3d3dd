"""A model folder on the Hugging Face Hub, as it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from epsanet.network.weights import find_model_folder, load_model

__all__ = ["Publication", "publish"]

_CARD_NEEDS = ("tags", "license", "metrics")


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What goes, or would go, to the Hub."""

    repo: str
    """``USER/NAME`` there."""
    folder: Path
    """The model folder."""
    files: dict[str, int]
    """Bytes of each file."""
    config: dict[str, Any]
    """Architecture, arguments, class names and preprocessing."""
    notes: tuple[str, ...]
    """What the card lacks."""
    url: str | None
    """Of the commit; nothing when it was a trial."""


def publish(model: str | Path, repo: str, *, private: bool = False, dry_run: bool = False) -> Publication:
    """Upload a model folder to the Hub, after reading it back as a user of timm will.

    Args:
        model: a model folder, a run folder, or the name of shipped weights.
        repo: ``USER/NAME``; made if it is not there.
        private: whether a new repository is for its owner only.
        dry_run: do everything but the upload; the Hub is not asked.

    Raises:
        ValueError: when the folder or its card is not fit for the Hub, there is no token, or the Hub refuses.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    folder = find_model_folder(model)
    if folder is None:
        raise ValueError(
            f"{model} is no model folder; give the one that training wrote, or make one with epsanet convert"
        )
    validate_repo_id(repo)
    _read_back(folder)
    publication = Publication(
        repo=repo,
        folder=folder,
        files={
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        },
        config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        notes=_check_card(folder),
        url=None,
    )
    if dry_run:
        return publication
    return Publication(**{**vars(publication), "url": _upload(publication, private)})


def _read_back(folder: Path) -> None:
    """Make sure that timm alone makes the same network of the folder as this package."""
    ours = load_model(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = torch.randn(1, *ours.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if not torch.equal(ours.model(image), theirs(image)):
            raise ValueError(f"{folder} gives other logits through timm than here; save the model again")


def _check_card(folder: Path) -> tuple[str, ...]:
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        raise ValueError(f"{folder} has no README.md; write a model card, with library_name: timm in its head")
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data.to_dict()
    except yaml.YAMLError as error:
        raise ValueError(f"the head of {path} is no YAML: {' '.join(str(error).split())}; mend it") from error
    if data.get("library_name") != "timm":
        raise ValueError(f"{path} does not say library_name: timm in its head, so the Hub cannot tell how it is loaded")
    return tuple(f"the model card names no {key}" for key in _CARD_NEEDS if not data.get(key))


def _upload(publication: Publication, private: bool) -> str:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ValueError(
            "there is no Hugging Face token here; run hf auth login, or set HF_TOKEN to one that may write"
        )
    api = HfApi(library_name="epsanet")
    try:
        repo = api.create_repo(publication.repo, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=publication.folder,
            allow_patterns=list(publication.files),
            commit_message=f"Upload {publication.config['architecture']}",
        )
    except Exception as error:  # the errors of whichever HTTP library the Hub's has
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{publication.repo} could not be uploaded: {reason}") from error
    return str(commit.commit_url)
