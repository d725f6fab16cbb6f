"""publish(): weights, processor, remote code and card to the Hugging Face Hub, in one commit or not at all.

What is uploaded is not the folder but what its model and processor save anew, so that logs, records of runs, optimiser
states and pickled weights cannot come along, and so that a folder that does not load is not published.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from spar_onnx.folder import RECORD, is_exported

from ..checkpoint_files import read_json
from ..checkpoints import load_tower
from ..files import draft_folder
from .exported import prepare_exported
from .model_card import model_card, read_records, without_path

HTTPError: Any = HfHubHTTPError.__bases__[0]  # httpx's or httpx2's, whichever this huggingface_hub speaks with
ATTEMPTS, WAIT_S = 3, 2.0  # for an upload that is cut off, beside the client's own retries of single requests

# A published file that the folder no longer has would be loaded all the same, or mislead.
OURS = re.compile(r"model.*\.safetensors(\.index\.json)?|pytorch_model.*\.bin|\w+_spar\.py|onnx/\w+\.onnx")
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}|\b(?:sk|ghp|github_pat)[-_][A-Za-z0-9_]{16,}")
LOCAL_PATH = re.compile(
    r"(?:file://|[A-Za-z]:\\|(?<![\w.:/])/)(?:home|Users|root|tmp|var|mnt|data|scratch|workspace)[/\\][\w.-]+"
)
NOT_SCANNED = ("tokenizer.json", "vocab.json", "merges.txt")  # words of a vocabulary, and megabytes of them


class PublishError(ValueError):
    """The model was not published; the message says why and what to do, on one line."""


@dataclass(frozen=True)
class Published:
    """What publishing did.

    Attributes:
        url: The repository, or the pull request.
        commit: The commit that holds the model now.
        changed: False where the repository held it already.
        files: The files of the model, by name.
        left_out: Files of the folder that were not uploaded.
        space_url: The Space, if one was asked for.
        page_url: The static Space, if one was asked for.
    """

    url: str
    commit: str
    changed: bool
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    space_url: str | None = None
    page_url: str | None = None


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    with_space: bool = False,
    with_page: str | Path | None = None,
    license: str | None = None,
    token: str | None = None,
) -> Published:
    """Publishes a model that `save_pretrained`, `spar convert`, `spar export` or `training/distill.py` wrote.

    Args:
        folder: The model's folder. Results beside it (metrics.json of a distillation, `spar evaluate --json` files
            inside it) go into the card.
        repo_id: `owner/name`.
        private: Create the repository as a private one.
        create_pr: Open a pull request instead of committing to the main branch; the repository must exist.
        with_space: Also create the Space `owner/name-space` that shows the model.
        with_page: A page that `spaces/browser/build.py` built with this exported folder: also create the static Space
            `owner/name-page` from it.
        license: Identifier of the licence for the card, such as `apache-2.0`.
        token: A token with write access; None is the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        PublishError: There is nothing to publish, no right to, or no way to; nothing was committed.
    """
    _check_repo_id(repo_id)
    if with_space and is_exported(Path(folder)):
        raise PublishError(
            f"{folder} is an exported folder, which the Gradio Space cannot load; publish the model that it was "
            "exported from with --with-space, and this folder with --with-page."
        )
    page = {} if with_page is None else _page_files(Path(with_page), Path(folder))
    with _draft(repo_id) as draft:
        prepare(folder, draft, repo_id, license)
        files = {path.relative_to(draft).as_posix(): path for path in sorted(draft.rglob("*")) if path.is_file()}
        ours = {name.partition("/")[0] for name in files}
        left_out = tuple(sorted(path.name for path in Path(folder).iterdir() if path.name not in ours))
        api = _api(token)
        before = _open_repository(api, repo_id, private, create_pr)
        message = f"Publish {repo_id.partition('/')[2]}"
        url, commit = _commit(api, repo_id, "model", files, message, create_pr)
        space_url = _publish_space(api, repo_id, private) if with_space else None
        page_url = _publish_page(api, repo_id, private, page) if page else None
    return Published(url, commit, commit != before, tuple(files), left_out, space_url, page_url)


def prepare(folder: str | Path, draft: Path, repo_id: str, license: str | None = None) -> None:
    """Writes into `draft` exactly the files that are published.

    Raises:
        PublishError: The folder holds no model that loads, or a file would give away a token or a path.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishError(f"there is no folder {folder}; give the folder that save_pretrained or distill.py wrote.")
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise PublishError(
            f"{folder} holds pickled weights (*.bin) only, and these can run code when they are loaded; load the "
            "model and save it with save_pretrained, which writes safetensors."
        )
    if is_exported(folder):
        try:
            prepare_exported(folder, draft, repo_id, license)
        except (ValueError, OSError) as error:
            raise PublishError(f"{folder} cannot be published: {error}") from error
        _check_all_leaks(draft)
        return
    try:
        model, vision, processor = load_tower(str(folder))
    except (ValueError, OSError) as error:
        raise PublishError(f"{folder} cannot be published, for it does not load: {error}") from error
    records = read_records(folder, vision.config.teacher)
    for config in (vision.config, getattr(model.config, "vision_config", vision.config)):
        config.source, config.teacher = _clean(config.source), _clean(config.teacher)
    model.save_pretrained(draft)
    if processor is not None:
        processor.save_pretrained(draft)
    model_card(repo_id, model, records, processor is not None, license).save(draft / "README.md")
    _check_all_leaks(draft)


def _check_all_leaks(draft: Path) -> None:
    for path in draft.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in NOT_SCANNED:
            _check_leaks(path.name, path.read_text(encoding="utf-8"))


def _draft(repo_id: str) -> AbstractContextManager[Path]:
    """A folder of the cache, for the files of a repository; killed runs' copies of the weights are cleared there."""
    return draft_folder(Path(constants.HF_HOME) / "spar-publish" / repo_id.replace("/", "--"))


def _clean(value: Any) -> Any:
    """A value of a configuration without this machine's paths, at any depth."""
    if isinstance(value, dict):
        return {key: _clean(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    return without_path(value) if isinstance(value, str) else value


def _check_leaks(name: str, text: str) -> None:
    for what, pattern in (("what looks like a token", SECRET), ("a path of this machine", LOCAL_PATH)):
        if found := pattern.search(text):
            line = text.count("\n", 0, found.start()) + 1
            shown = found.group()[:6] + "…" if pattern is SECRET else found.group()
            raise PublishError(
                f"{name} would publish {what} in line {line} ({shown}); remove it from the folder's files."
            )


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"--repo-id is {repo_id!r}: {str(error).splitlines()[0]}") from error
    if repo_id.count("/") != 1:
        raise PublishError(f"--repo-id is {repo_id!r}; give owner and name, such as you/spar.")


def _api(token: str | None) -> HfApi:
    """A client whose token may write."""
    if token is None and get_token() is None:
        raise PublishError(
            "there is no token for the Hub; run 'hf auth login', or set HF_TOKEN to a token with write access "
            "(https://huggingface.co/settings/tokens)."
        )
    api = HfApi(token=token)
    with _words("reach the Hub", api):
        role = api.whoami()["auth"].get("accessToken", {}).get("role")
    if role == "read":
        raise PublishError(
            "the token can only read; make one with write access at https://huggingface.co/settings/tokens and give "
            "it to 'hf auth login'."
        )
    return api


def _open_repository(api: HfApi, repo_id: str, private: bool, create_pr: bool) -> str | None:
    """Creates the repository if there is none; the commit it stands at."""
    with _words(f"open {repo_id}", api):
        try:
            info: ModelInfo = api.model_info(repo_id)
        except RepositoryNotFoundError:
            if create_pr:
                raise PublishError(
                    f"there is no repository {repo_id} to open a pull request in; check --repo-id."
                ) from None
            api.create_repo(repo_id, private=private, exist_ok=True)
            info = api.model_info(repo_id)
        else:
            if private and not info.private:
                raise PublishError(
                    f"{repo_id} exists and is public; make it private in its settings, or choose another --repo-id."
                )
            _check_holds_ours(api, repo_id, {file.rfilename for file in info.siblings or ()})
    return info.sha


def _check_holds_ours(api: HfApi, repo_id: str, names: set[str]) -> None:
    """A name that is taken by another model is not overwritten."""
    if "config.json" not in names:
        return
    path = api.hf_hub_download(repo_id, "config.json")
    try:
        model_type = read_json(Path(path)).get("model_type")
    except ValueError:
        model_type = None  # whatever it is, it is not ours
    if not str(model_type).startswith("spar"):
        raise PublishError(f"{repo_id} holds another model (model_type {model_type!r}); choose another --repo-id.")


def _commit(
    api: HfApi, repo_id: str, kind: str, files: dict[str, Path], message: str, create_pr: bool = False
) -> tuple[str, str]:
    """One commit of all files; none if the repository has them. Returns an address and the commit.

    An attempt after a lost answer is safe: what is there already is not committed again. A pull request could be
    opened twice, so that is attempted once.
    """
    for attempt in count(1):
        try:
            return _commit_once(api, repo_id, kind, files, message, create_pr)
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            if create_pr or attempt == ATTEMPTS or _is_refusal(error):
                raise PublishError(_in_words(error, f"upload to {repo_id}", api)) from error
            time.sleep(WAIT_S * attempt)
    raise AssertionError("the loop above ends by returning or raising")


def _commit_once(
    api: HfApi, repo_id: str, kind: str, files: dict[str, Path], message: str, create_pr: bool
) -> tuple[str, str]:
    there = set(api.list_repo_files(repo_id, repo_type=kind))
    stale = sorted(name for name in there - set(files) if OURS.fullmatch(name))
    operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    made = api.create_commit(repo_id, operations, commit_message=message, repo_type=kind, create_pr=create_pr)
    prefix = "spaces/" if kind == "space" else ""
    return made.pr_url or f"{api.endpoint}/{prefix}{repo_id}", made.oid


def _publish_space(api: HfApi, repo_id: str, private: bool) -> str:
    """The Space `owner/name-space`: three small files that start `spar_hf.demo` with the model."""
    from ..demo.space import space_files

    space_id = f"{repo_id}-space"
    with _draft(space_id) as draft, _words(f"open the Space {space_id}", api):
        files = {}
        for name, content in space_files(repo_id).items():
            files[name] = draft / name
            files[name].write_text(content, encoding="utf-8")
        api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        url, _ = _commit(api, space_id, "space", files, f"Show {repo_id}")
    return url


def _page_files(page: Path, folder: Path) -> dict[str, Path]:
    """The files of a built page, by name.

    Raises:
        PublishError: it is none, or ships with another model than the folder's.
    """
    records = sorted(page.glob(f"models/*/{RECORD}"))
    if not records or not (page / "service-worker.js").is_file():
        raise PublishError(
            f"{page} is no built page; build one with 'python spaces/browser/build.py --model {folder} "
            f"--output {page}'."
        )
    if not is_exported(folder) or records[0].read_bytes() != (folder / RECORD).read_bytes():
        raise PublishError(
            f"{page} ships with another model than {folder}; build it with 'python spaces/browser/build.py --model "
            f"{folder} --output {page}', where the folder is one of 'spar export'."
        )
    return {path.relative_to(page).as_posix(): path for path in sorted(page.rglob("*")) if path.is_file()}


def _publish_page(api: HfApi, repo_id: str, private: bool, files: dict[str, Path]) -> str:
    """The static Space `owner/name-page`: a built page as it is."""
    space_id = f"{repo_id}-page"
    with _words(f"open the Space {space_id}", api):
        api.create_repo(space_id, repo_type="space", space_sdk="static", private=private, exist_ok=True)
        url, _ = _commit(api, space_id, "space", files, f"Show {repo_id} in the browser")
    return url


def _is_refusal(error: BaseException) -> bool:
    """Whether the same request would be refused again."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code < 500 and error.response.status_code != 429
    return isinstance(error, (OfflineModeIsEnabled, ValueError))


@contextmanager
def _words(what: str, api: HfApi) -> Iterator[None]:
    """Turns the client's errors into one line with a remedy."""
    try:
        yield
    except PublishError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        raise PublishError(_in_words(error, what, api)) from error


def _in_words(error: BaseException, what: str, api: HfApi) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return f"cannot {what}: offline mode is on; unset HF_HUB_OFFLINE."
    if not isinstance(error, HfHubHTTPError):
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        return f"cannot {what}: {reason} ({api.endpoint}); check the network and run the same command again."
    status = error.response.status_code
    remedy = {
        401: "the token is not valid; get one with write access at https://huggingface.co/settings/tokens and run "
        "'hf auth login'",
        403: "the token has no right to write there; give a --repo-id under your own name or an organisation of "
        "yours, a token with write access, or --create-pr",
        404: "there is no such repository, or the token may not see it; check --repo-id",
        412: "another commit came in between; run the same command again",
        429: "the Hub asks to wait; run the same command again in some minutes",
    }.get(status)
    if remedy is None:
        said = (error.server_message or "").split("\n")[0]
        remedy = f"the Hub answered {status} {said}".rstrip() + "; run the same command again later"
    return f"cannot {what}: {remedy}."
