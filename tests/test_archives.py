"""Archives: interrupted downloads go on, check sums are compared or recorded, and unpacking is safe and whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from archive_server import ArchiveServer, tarred, zipped

from spar_hf.reproduction import archives
from spar_hf.reproduction.archives import Archive, Problem, download, read_records, unpack

CONTENT = bytes(range(256)) * 4000
MEMBERS = (("top/kept", "data/kept"), ("top/deep/er", "data/deeper"))
FILES = {"top/kept/a.txt": b"a", "top/kept/b/c.txt": b"c" * 3000, "top/left/out.txt": b"x", "top/deep/er/d.png": b"d"}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(archives, "WAIT_S", 0.0)
    with ArchiveServer() as running:
        running.files["/file.zip"] = CONTENT
        yield running


def archive(server: ArchiveServer, **changes: object) -> Archive:
    md5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
    return replace(Archive(f"{server.url}/file.zip", "file.zip", 0.001, MEMBERS, md5, "somebody"), **changes)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_download_is_whole_compared_and_made_once(server, tmp_path):
    path = download(archive(server), tmp_path, progress=False)
    assert path.read_bytes() == CONTENT and left(tmp_path) == {"file.zip", "checksums.json"}
    record = read_records(tmp_path)["file.zip"]
    assert record["sha256"] == hashlib.sha256(CONTENT).hexdigest() and record["bytes"] == len(CONTENT)
    assert record["compared_with"] == f"md5:{hashlib.md5(CONTENT).hexdigest()}, as published by somebody"
    download(archive(server), tmp_path, progress=False)
    assert len(server.asked) == 1


def test_a_connection_that_breaks_is_taken_up_again(server, tmp_path):
    """Three breaks in one run: each request asks for what is not there yet."""
    server.cut = lambda path, first: 300_000 if first < 900_000 else None
    assert download(archive(server), tmp_path, progress=False).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_run_that_ended_is_gone_on_with(server, tmp_path):
    server.cut = lambda path, first: 500_000 if first == 0 else 0
    with pytest.raises(
        Problem, match=r"cannot be downloaded: the connection ended after 500000 of 1024000 bytes; run"
    ):
        download(archive(server), tmp_path, progress=False)
    assert left(tmp_path) == {"file.zip.part", "file.zip.part.json"}
    server.cut, asked = lambda path, first: None, len(server.asked)
    assert download(archive(server), tmp_path, progress=False).read_bytes() == CONTENT
    assert server.asked[asked:] == [("/file.zip", "bytes=500000-")]


@pytest.mark.parametrize("how", ["changed", "no ranges", "no tags"])
def test_a_draft_that_cannot_be_gone_on_with_is_begun_anew(how, server, tmp_path):
    server.tags = how != "no tags"
    server.cut = lambda path, first: 500_000 if first == 0 else 0
    with pytest.raises(Problem):
        download(archive(server), tmp_path, progress=False)
    server.cut, server.ranges = lambda path, first: None, how != "no ranges"
    wanted = archive(server)
    if how == "changed":
        server.files["/file.zip"] = CONTENT[::-1]
        wanted = archive(server, checksum="sha1:" + hashlib.sha1(CONTENT[::-1]).hexdigest())
    assert download(wanted, tmp_path, progress=False).read_bytes() == server.files["/file.zip"]
    assert left(tmp_path) == {"file.zip", "checksums.json"}


def test_a_draft_that_is_whole_is_kept(server, tmp_path, monkeypatch):
    """Killed between the last byte and the name."""

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(archives, "_check", killed)
        with pytest.raises(KeyboardInterrupt):
            download(archive(server), tmp_path, progress=False)
    assert download(archive(server), tmp_path, progress=False).read_bytes() == CONTENT
    assert server.asked == [("/file.zip", None), ("/file.zip", "bytes=1024000-")]  # answered 416: there is no more


def test_a_wrong_checksum_is_refused_and_the_file_moved_aside(server, tmp_path):
    wrong = archive(server, checksum="md5:" + "0" * 32)
    with pytest.raises(
        Problem, match=r"file.zip has the md5 \w{32} and not 0{32}, that somebody gives; it was moved to"
    ):
        download(wrong, tmp_path, progress=False)
    assert left(tmp_path) == {"file.zip.wrong"} and read_records(tmp_path) == {}
    assert download(archive(server), tmp_path, progress=False).read_bytes() == CONTENT


def test_an_unknown_checksum_is_recorded_and_holds_from_then_on(server, tmp_path):
    unknown = archive(server, checksum="", source="")
    download(unknown, tmp_path, progress=False).unlink()
    assert read_records(tmp_path)["file.zip"]["compared_with"] == ""
    server.files["/file.zip"] = CONTENT[:-1]
    with pytest.raises(
        Problem, match=r"the sha256 \w{64} and not \w{64}, of its first download here; it was moved to"
    ):
        download(unknown, tmp_path, progress=False)


def test_a_file_put_there_by_hand_is_compared_too(server, tmp_path):
    (tmp_path / "file.zip").write_bytes(b"something else")
    with pytest.raises(Problem, match="has the md5"):
        download(archive(server), tmp_path, progress=False)
    by_hand = archive(server, checksum="", login="make an account at https://example.org, then log in and download it")
    with pytest.raises(Problem, match=r"cannot be downloaded without an account: make an account .* as file.zip"):
        download(by_hand, tmp_path, progress=False)
    (tmp_path / "file.zip").write_bytes(CONTENT)
    assert download(by_hand, tmp_path, progress=False) == tmp_path / "file.zip"
    assert server.asked == []


def test_what_cannot_be_had_is_said(server, tmp_path, monkeypatch):
    with pytest.raises(
        Problem, match=r"/gone answers 404 Not Found; see the page of the data set for where it is now"
    ):
        download(archive(server, url=f"{server.url}/gone"), tmp_path, progress=False)
    server.status = 503
    with pytest.raises(Problem, match=r"cannot be downloaded: 503 Service Unavailable; run the same command again"):
        download(archive(server), tmp_path, progress=False)
    assert len(server.asked) == 1 + archives.ATTEMPTS
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(OSError, match=r"needs 0.00 GB more but its disk has 0.00 GB free. Free some space"):
        download(archive(server), tmp_path, progress=False)


@pytest.mark.parametrize("write", [zipped, tarred])
def test_folders_are_unpacked_whole_and_once(write, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(write(FILES))
    unpack(path, MEMBERS, tmp_path / "to", progress=False)
    found = {file.relative_to(tmp_path / "to").as_posix(): file.read_bytes() for file in files_in(tmp_path / "to")}
    assert found == {"data/kept/a.txt": b"a", "data/kept/b/c.txt": b"c" * 3000, "data/deeper/d.png": b"d"}
    (tmp_path / "to/data/kept/a.txt").write_bytes(b"mine")
    path.unlink()
    unpack(path, MEMBERS, tmp_path / "to", progress=False)  # nothing is left to do
    assert (tmp_path / "to/data/kept/a.txt").read_bytes() == b"mine"


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_nothing_leaves_the_folder(tmp_path):
    evil = {"top/kept/../../../../out.txt": b"x", "/top/kept/b.txt": b"x", "top/kept/a.txt": b"a"}
    for write in (zipped, tarred):
        path = tmp_path / "file"
        path.write_bytes(write(evil))
        unpack(path, MEMBERS[:1], tmp_path / write.__name__, progress=False)
        assert [file.name for file in files_in(tmp_path / write.__name__)] == ["a.txt"]
    path.write_bytes(tarred({"top/kept/a.txt": b"a"}, links={"top/kept/b.txt": "/etc/passwd"}))
    unpack(path, MEMBERS[:1], tmp_path / "links", progress=False)
    assert [file.name for file in files_in(tmp_path / "links")] == ["a.txt"]
    assert not (tmp_path / "out.txt").exists()


def test_damaged_and_other_archives(tmp_path, monkeypatch):
    path = tmp_path / "file"
    for content, said in (
        (b"no archive at all" * 100, "is damaged"),
        (tarred(FILES)[:1000], "is damaged"),
        (zipped({"else/a.txt": b"a"}), "holds no top/kept; it is another archive than was expected"),
    ):
        path.write_bytes(content)
        with pytest.raises(Problem, match=said):
            unpack(path, MEMBERS, tmp_path / "to", progress=False)
        assert not files_in(tmp_path / "to") if (tmp_path / "to").exists() else True
    path.write_bytes(tarred(FILES))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(OSError, match=r"needs 0.00 GB more"):
        unpack(path, MEMBERS, tmp_path / "to", progress=False)


def test_records_are_json(server, tmp_path):
    download(archive(server), tmp_path, progress=False)
    assert json.loads((tmp_path / "checksums.json").read_text())["file.zip"]["url"] == f"{server.url}/file.zip"
