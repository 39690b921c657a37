"""A trained student on the hub: what others need to load and to judge it, and nothing of how it trained."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from distily.hub import asking, logged_in
from featurestore.format.tokenizer_files import TEMPLATE_FOLDER, TOKENIZER_PATTERNS
from student.errors import UserError

CARD = "README.md"
# Patterns of the hub's client, where * also matches slashes: hence `_left_out`, for checkpoints, logs and the
# stages of a recipe.
UPLOADED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    *TOKENIZER_PATTERNS,
    CARD,
    "*.png",
    "*.svg",
]


def push_student(directory: str | Path, repo: str, private: bool = False) -> str:
    """Upload weights, config, tokenizer, card and plots of a trained student to the model `repo`; its URL.

    Checkpoints, optimizer states, training_args.bin and logs stay. Raises UserError when `directory` holds no
    student, HubError when the hub refuses us, before anything is sent, or fails.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise UserError(f"DIR {directory} holds no trained student: config.json or *.safetensors is missing")
    api = logged_in(repo)
    with asking(f"REPO {repo}"):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=directory,
            allow_patterns=UPLOADED,
            ignore_patterns=_left_out(directory),
            commit_message="Student, card and plots",
        )
    return str(url)


def _left_out(directory: Path) -> list[str]:
    """Patterns of what is not uploaded: hidden files, and every folder but that of named chat templates."""
    folders = (path.name for path in directory.iterdir() if path.is_dir())
    return [".*", *(f"{escape(name)}/*" for name in folders if name != TEMPLATE_FOLDER)]
