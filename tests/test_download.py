"""Does download.sh bring LLaMA's files whole, over bad lines, without showing the signed link?

Idea: a real HTTP server on 127.0.0.1 serves small fake files, and misbehaves on request. The
script under test is a copy whose table of sums is rewritten to the fakes' sums, so that the script
itself needs no switch that could turn its checks off. Every test runs with curl and with wget.
Limits: no TLS, no bash 3.2, of which none was to be had; macOS's `md5` is a stand-in.
"""

import hashlib
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "download.sh"
SECRET = "S3cr~t_-"  # in the link; nothing but the server's own memory may show it
PREFIX, QUERY = "/a%2Fb/~x/", f"?Policy=ey~J_&Signature={SECRET}&&q=?*%2F*&Key=$HOME"
BASH = shutil.which("bash")
HELPERS = ("awk", "cut", "head", "md5sum", "mkdir", "mv", "rm", "tr")  # and curl or wget
SHARD = "7B/consolidated.00.pth"
PAGE = b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>\n"

UNKNOWN = r"download.sh: no size \S+: choose from 7B,13B,30B,65B .*\n"

pytestmark = pytest.mark.skipif(BASH is None, reason="download.sh needs bash")


def md5(data):
    return hashlib.md5(data).hexdigest()


def fake_files():
    """What the server serves. The tokenizer starts as real ones do: <unk> after control bytes."""
    files = {"tokenizer.model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02" + bytes(range(256))}
    for size, shards in (("7B", 1), ("13B", 2), ("30B", 4), ("65B", 8)):
        names = [f"consolidated.{i:02d}.pth" for i in range(shards)]
        for name in names:
            files[f"{size}/{name}"] = b"PK\x03\x04" + f"{size}{name}".encode() * 9000
        files[f"{size}/params.json"] = b'{"dim": 4096, "vocab_size": -1}\n'
        lines = [f"{md5(files[f'{size}/{n}'])}  {n}\n" for n in [*names, "params.json"]]
        files[f"{size}/checklist.chk"] = "".join(lines).encode()
    line = f"{md5(files['tokenizer.model'])}  tokenizer.model\n"
    files["tokenizer_checklist.chk"] = line.encode()
    return files


class Site(ThreadingHTTPServer):
    """Serves `files`; `log` holds (path, Range header or None), the other fields spoil things."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.log, self.wrong_links = fake_files(), [], []
        self.ranges = True
        self.cut = {}  # path -> bytes after which the connection closes, once
        self.hold = {}  # path -> bytes after which the server waits for `release`, once
        self.release = threading.Event()
        self.answers = {}  # path -> (status, body) instead of the file
        self.busy = {}  # the same, once
        self.moved = None  # where all paths are now
        self.pause = 0  # seconds after each 4 KiB
        self.query = QUERY

    @property
    def link(self):
        return f"http://127.0.0.1:{self.server_port}{PREFIX}*{self.query}"

    def handle_error(self, request, client_address):
        pass  # a killed client is part of the plan


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        path = self.path.removeprefix(PREFIX).removesuffix(site.query)
        if self.path != PREFIX + path + site.query:
            site.wrong_links.append(self.path)
            return self.reply(400, b"this is not the signed link")
        if site.moved:
            return self.reply(302, b"", {"Location": site.moved.replace("*", path, 1)})
        asked = self.headers["Range"]
        site.log.append((path, asked))
        if answer := site.busy.pop(path, None) or site.answers.get(path):
            return self.reply(*answer)
        body, start = site.files[path], 0
        if asked and site.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                return self.reply(416, b"nothing left", {"Content-Range": f"bytes */{len(body)}"})
            headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            return self.reply(206, body[start:], headers, path)
        self.reply(200, body, {}, path)

    def reply(self, status, body, headers=None, path=None):
        site = self.server
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: site.cut.pop(path, None)]
        if sent := site.hold.pop(path, 0):
            self.wfile.write(body[:sent])
            site.release.wait(10)
        while site.pause and len(body) - sent > 4096:
            self.wfile.write(body[sent : sent + 4096])
            sent += 4096
            time.sleep(site.pause)
        self.wfile.write(body[sent:])

    def log_message(self, *args):
        pass


@contextmanager
def serving():
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def site():
    with serving() as server:
        yield server


class Shell:
    """A copy of the script with the fakes' sums, and a PATH of exactly the tools it may use."""

    def __init__(self, tmp_path, tool, site):
        self.tmp, self.folder, self.tool = tmp_path, tmp_path / "with spaces", tool
        self.site = site
        self.bin = tmp_path / "bin"
        self.bin.mkdir()
        for name in (*HELPERS, tool):
            found = shutil.which(name)
            if found is None and name != "md5sum":
                pytest.skip(f"no {name} on this machine")
            if found is not None:
                (self.bin / name).symlink_to(found)
        if shutil.which("md5sum") is None:
            self.add("md5", '#!/bin/sh\nexec /sbin/md5 "$@"\n')
        self.add("sleep", "#!/bin/sh\n")  # the pauses between two tries are none of our time
        table = re.compile(r"^([0-9a-f]{32})  (\S+)$", re.MULTILINE)
        text, count = table.subn(lambda m: f"{md5(site.files[m[2]])}  {m[2]}", SCRIPT.read_text())
        assert count == 1 + 1 + 2 + 4 + 8
        self.script = tmp_path / "download.sh"
        self.script.write_text(text)
        for name in ("home", "scratch"):
            (tmp_path / name).mkdir()
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(tmp_path / "home"),
            "TMPDIR": str(tmp_path / "scratch"),
            "TERM": "dumb",
        }

    def add(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *args, link, **streams):
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [BASH, str(self.script), *map(str, args)],
            env=self.env if link is None else {**self.env, "PRESIGNED_URL": link},
            cwd=self.tmp,
            text=True,
            start_new_session=True,
            **pipes | streams,
        )

    def run(self, *args, link):
        """Exit status and what was said, after checks that hold for every run."""
        process = self.start(*args, link=link)
        out, err = process.communicate(timeout=15)
        assert out == ""
        assert SECRET not in err
        return process.returncode, err

    def brings(self, sizes="7B"):
        """What a run says that ends well and leaves all files of these sizes, and not one more."""
        status, said = self.run(sizes, self.folder, link=self.site.link)
        assert status == 0, said
        assert self.holds(*sizes.split(","))
        return said

    def fails(self, sizes="7B"):
        """What a run says that does not."""
        status, said = self.run(sizes, self.folder, link=self.site.link)
        assert status == 1, said
        return said

    def holds(self, *sizes):
        files = self.site.files.items()
        want = {n: d for n, d in files if "/" not in n or n.split("/")[0] in sizes}
        found = (p for p in self.folder.rglob("*") if p.is_file())
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in found} == want

    def part(self, path, content=None):
        """Where what has come of a file lies; where it has content, it lies there now."""
        part = self.folder / f"{path}.part"
        if content is not None:
            part.parent.mkdir(parents=True)
            part.write_bytes(content)
        return part


@pytest.fixture(params=["curl", "wget"])
def shell(request, tmp_path, site):
    return Shell(tmp_path, request.param, site)


@pytest.fixture
def one_shell(tmp_path, site):
    """For what does not depend on the tool."""
    return Shell(tmp_path, "curl" if shutil.which("curl") else "wget", site)


@pytest.fixture
def sigint():
    """A pytest started with & ignores SIGINT, which no shell below it could then trap."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def requests_of(site, path):
    return [asked for name, asked in site.log if name == path]


def held(site, shell):
    """A run that waits in the middle of SHARD."""
    site.hold[SHARD] = 60_000
    process, part = shell.start("7B", shell.folder, link=site.link), shell.part(SHARD)
    end = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size > 50_000):
        assert time.monotonic() < end, "waited 10 s in vain"
        time.sleep(0.01)
    return process


def test_two_sizes_arrive_whole_and_later_runs_bring_only_what_is_missing(site, shell):
    said = shell.brings("7B,13B")
    assert len(site.log) == 2 + 3 + 4 and not site.wrong_links
    assert said.endswith(f"{shell.folder} holds 7B,13B, whole\n")
    for missing in ([], ["13B/consolidated.01.pth"]):
        for path in missing:
            (shell.folder / path).unlink()
        site.log.clear()
        shell.brings("7B,13B")
        assert site.log == [(path, None) for path in missing]


def test_a_cut_connection_is_resumed_in_the_same_run(site, shell):
    site.cut[SHARD] = 50_000
    assert f"{SHARD}: interrupted" in shell.brings()
    assert requests_of(site, SHARD) == [None, "bytes=50000-"]


def test_a_busy_server_is_asked_again(site, one_shell):
    if one_shell.tool == "wget":
        pytest.skip("a quiet wget does not tell 503 from 403")
    site.busy[SHARD] = (503, b"later")
    assert "HTTP 503" in one_shell.brings()


@pytest.mark.parametrize("how", ["SIGINT to all", "SIGKILL to all", "SIGTERM to the script"])
def test_a_killed_run_is_resumed_by_the_next(site, shell, how, sigint):
    process, part = held(site, shell), shell.part(SHARD)
    name, _, whom = how.split(maxsplit=2)
    send = os.killpg if whom == "all" else os.kill
    send(process.pid, getattr(signal, name))
    process.communicate(timeout=5)  # returns once no child holds stderr: none is left to write on
    assert process.returncode != 0
    assert not (shell.folder / SHARD).exists()
    came = part.stat().st_size
    site.log.clear()
    shell.brings()
    assert site.log == [(SHARD, f"bytes={came}-")]


def test_a_second_run_in_the_same_folder_says_that_there_is_one(site, one_shell):
    first, log = held(site, one_shell), [*site.log]
    said = one_shell.fails()
    assert said.startswith(f"download.sh: another run (process {first.pid}) is downloading to ")
    assert said.count("\n") == 1 and site.log == log
    site.release.set()
    assert first.wait(10) == 0 and one_shell.holds("7B")


@pytest.mark.slow
def test_20_kills_at_random_moments_lose_nothing_that_came(site, shell, sigint):
    """Each run goes on where the one before ended, whichever signal ended it."""
    chance = random.Random(shell.tool)
    site.pause = 0.02  # 13B takes 4 s
    older, sizes, killed_midway = {}, {}, 0
    for _ in range(20):
        site.log.clear()
        process = shell.start("13B", shell.folder, link=site.link)
        time.sleep(0.05 + 0.4 * chance.random())
        os.killpg(process.pid, chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]))
        process.communicate(timeout=5)
        for path, asked in site.log:  # the server may hear of a run after its end
            came = older.get(path, 0), sizes.get(path, 0)
            assert asked in [f"bytes={n}-" if n else None for n in came]
        now = {}
        for path, content in site.files.items():
            whole, part = shell.folder / path, shell.part(path)
            assert not whole.exists() or whole.read_bytes() == content
            if part.exists():
                assert content.startswith(part.read_bytes())
                killed_midway += 1
            now[path] = next((p.stat().st_size for p in (whole, part) if p.exists()), 0)
            assert now[path] >= sizes.get(path, 0)
        older, sizes = sizes, now
    assert killed_midway > 5
    site.pause = 0
    shell.brings("13B")


def test_a_redirect_is_followed_and_resumed_there(site, shell):
    """To another server, whose link is signed too."""
    with serving() as there:
        site.moved = there.link
        there.cut[SHARD] = 50_000
        shell.brings()
        assert requests_of(there, SHARD) == [None, "bytes=50000-"]


def test_a_redirect_without_end_is_an_error(site, one_shell):
    site.moved = site.link
    assert "no tokenizer.model (" in one_shell.fails().splitlines()[-1]


def test_a_redirect_to_a_file_of_this_machine_is_refused(site, shell):
    (shell.tmp / "private").write_text("private")
    site.moved = f"file://{shell.tmp}/private?*"
    said = shell.fails()
    assert all(p.stat().st_size == 0 for p in shell.folder.rglob("*") if p.is_file()), said


def test_a_part_that_is_already_whole_is_taken(site, shell):
    shell.part(SHARD, site.files[SHARD])  # killed between the last byte and the sum
    shell.brings()


def test_a_server_without_ranges_is_read_again_from_the_start(site, shell):
    site.ranges = False
    site.cut[SHARD] = 50_000
    shell.brings()
    assert "bytes=50000-" in requests_of(site, SHARD)


def test_no_network_ends_after_some_tries_and_keeps_what_came(site, shell):
    part = shell.part("tokenizer.model", b"\n\x0e")
    link = site.link.replace(str(site.server_port), "1")  # nobody listens there
    status, said = shell.run("7B", shell.folder, link=link)
    assert status == 1
    assert "check the network" in said.splitlines()[-1]
    assert part.read_bytes() == b"\n\x0e"


@pytest.mark.parametrize("path", ["13B/consolidated.00.pth", "13B/params.json", "tokenizer.model"])
def test_a_wrong_file_is_named_with_both_sums_and_is_not_kept(site, shell, path):
    right, wrong = md5(site.files[path]), b"PK damaged"
    site.answers[path] = (200, wrong)
    assert f"{path} came with md5 sum {md5(wrong)}, not {right}" in shell.fails("13B")
    assert not (shell.folder / path).exists() and not shell.part(path).exists()
    assert (shell.folder / "13B/consolidated.01.pth").exists()  # the others are brought
    site.answers.clear()
    shell.brings("13B")


@pytest.mark.parametrize("length", [100, 1_000_000])
def test_a_spoilt_part_is_found_out_and_the_next_run_starts_afresh(shell, length):
    shell.part(SHARD, b"X" * length)
    assert f"{SHARD} came with md5 sum" in shell.fails()
    shell.brings()


def test_a_wrong_file_that_lay_there_before_is_reported_and_not_touched(site, shell):
    (shell.folder / SHARD).parent.mkdir(parents=True)
    (shell.folder / SHARD).write_bytes(b"not ours")
    assert f"{shell.folder / SHARD} has md5 sum {md5(b'not ours')}, not " in shell.fails()
    assert (shell.folder / SHARD).read_bytes() == b"not ours"
    assert requests_of(site, SHARD) == []


def test_a_checklist_without_params_json_is_named(site, shell):
    site.files["7B/checklist.chk"] = b"nothing of use\n"
    assert f"no params.json in {shell.folder}/7B/checklist.chk" in shell.fails()


@pytest.mark.parametrize("status_code", [403, 200])
@pytest.mark.parametrize("page", [PAGE, b"\n\n <!DOCTYPE html><html>expired</html>"])
def test_an_error_page_is_not_saved_and_the_link_is_said_to_have_expired(
    site, shell, status_code, page
):
    site.answers[SHARD] = (status_code, page)
    last = shell.fails().splitlines()[-1]
    assert SHARD in last
    assert "the link has probably expired, request a new one" in last
    assert not (shell.folder / SHARD).exists()
    assert len(requests_of(site, SHARD)) == 1
    assert all(b"<!DOC" not in p.read_bytes() for p in shell.folder.rglob("*") if p.is_file())


def test_an_expired_link_leaves_the_part_to_be_resumed_with_a_new_one(site, shell):
    shell.part(SHARD, site.files[SHARD][:1000])
    site.answers[SHARD] = (403, PAGE)
    shell.fails()
    site.answers.clear()
    shell.brings()
    assert requests_of(site, SHARD) == ["bytes=1000-"] * 2


def test_the_link_is_in_no_command_line_no_environment_of_a_tool_and_no_file(site, shell):
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("no /proc on this machine")

    def files_with_it():
        return [p for p in shell.tmp.rglob("*") if p.is_file() and SECRET in p.read_text("latin1")]

    process, tool_seen = held(site, shell), False
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes()
            assert SECRET.encode() not in arguments
            if bytes(shell.part(SHARD)) in arguments:
                tool_seen = True
                assert SECRET.encode() not in (folder / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass  # ended meanwhile, or another user's
    assert tool_seen
    during = files_with_it()
    site.release.set()
    out, err = process.communicate(timeout=10)
    assert process.returncode == 0, err
    assert during == files_with_it() == [] and SECRET not in out + err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
def test_a_full_disk_is_named(shell):
    part = shell.part(SHARD, b"")
    part.unlink()
    part.symlink_to("/dev/full")
    last = shell.fails().splitlines()[-1]
    assert last.startswith(f"download.sh: cannot write {part} (")


def test_sums_are_made_by_macos_md5_where_md5sum_is_absent(site, shell):
    (shell.bin / "md5sum").unlink(missing_ok=True)
    text = f"""#!{sys.executable} -IS
import hashlib, sys
assert sys.argv[1] == "-q" and len(sys.argv) == 3
print(hashlib.md5(open(sys.argv[2], "rb").read()).hexdigest())
"""
    shell.add("md5", text)
    site.answers["7B/params.json"] = (200, b"{}")
    shell.fails()
    site.answers.clear()
    shell.brings()


@pytest.mark.parametrize("missing", ["md5", "transfer"])
def test_a_missing_tool_is_named(site, shell, missing):
    for name in ("md5sum", "md5") if missing == "md5" else (shell.tool,):
        (shell.bin / name).unlink(missing_ok=True)
    said = shell.fails()
    assert ("neither md5sum nor md5" if missing == "md5" else "neither curl nor wget") in said
    assert len(said.splitlines()) == 1 and site.log == []


@pytest.mark.parametrize(
    "sizes, message",
    [
        *((sizes, UNKNOWN) for sizes in ("8B", "7B,33B", "7b", "7B/", "*", "consolidated")),
        (" ,\n", "download.sh: no sizes .*\n"),
    ],
)
def test_an_unknown_size_is_refused_before_anything_is_asked(site, one_shell, sizes, message):
    assert re.fullmatch(message, one_shell.fails(sizes))
    assert site.log == [] and not one_shell.folder.exists()


@pytest.mark.parametrize(
    "link",
    [
        f"http://127.0.0.1:1/llama?{SECRET}",
        f"127.0.0.1:1/*?{SECRET}",
        f"'http://127.0.0.1:1/*?{SECRET}'",
        f'http://127.0.0.1:1/*?{SECRET}"\noutput = "x',
        f"http://127.0.0.1:1/*?{SECRET}\\",
        f"http://127.0.0.1:1/*?{SECRET} -o x",
    ],
)
def test_a_link_that_is_none_is_refused_in_one_sentence_that_does_not_show_it(one_shell, link):
    status, said = one_shell.run("7B", one_shell.folder, link=link)
    assert status == 1
    assert re.fullmatch(r"download.sh: the link (is not|has a) .*: copy .*\n", said)
    assert not one_shell.folder.exists()


@pytest.mark.parametrize(
    "args, with_link, message",
    [
        ((), False, "no link"),
        (("7B",), False, "no link"),
        ((), True, "no sizes"),
        (("7B",), True, "no folder"),
        (("7B", "13B", "with spaces"), True, "3 arguments"),  # sizes need commas
    ],
)
def test_arguments_that_are_missing_or_too_many(site, one_shell, args, with_link, message):
    status, said = one_shell.run(*args, link=site.link if with_link else None)
    assert status == 1 and message in said and site.log == []
    given = "download.sh: no .* given and no terminal .*: run .*\n"
    assert len(args) == 3 or re.fullmatch(given, said)


@pytest.mark.parametrize("folder", ["-rf", "a b/c", "~/models"])
def test_odd_folders_are_taken_literally_but_for_the_home_folder(site, one_shell, folder):
    status, said = one_shell.run("7B", folder, link=site.link)
    assert status == 0, said
    one_shell.folder = one_shell.tmp / folder.replace("~", "home")
    assert one_shell.holds("7B")


def test_a_home_folder_that_nobody_knows_is_said(site, one_shell):
    del one_shell.env["HOME"]
    status, said = one_shell.run("7B", "~/models", link=site.link)
    assert status != 0 and "HOME: is not set: pass the whole path" in said and site.log == []


def test_a_folder_in_the_place_of_a_file_is_named(one_shell):
    (one_shell.folder / "7B" / "params.json").mkdir(parents=True)
    said = one_shell.fails()
    assert said.endswith("7B/params.json is a folder: move it elsewhere and run again\n")


def test_at_a_terminal_what_is_missing_is_asked_for(site, one_shell):
    site.query += "&Policy=" + "x" * 5000  # longer than a terminal's own line editor takes
    if one_shell.tool == "curl":
        site.query += "&Key=[1-2]{a,b}"  # wget encodes these
    ours, theirs = pty.openpty()
    process = one_shell.start(link=None, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    replies = {b"PRESIGNED_URL): ": site.link, b"65B): ": "7B, 13B", b"folder: ": "with spaces"}
    for prompt, reply in replies.items():
        seen = b""
        while not seen.endswith(prompt):
            assert select.select([ours], [], [], 5)[0], f"no prompt {prompt} after {seen}"
            seen += os.read(ours, 4096)
        os.write(ours, reply.encode() + b"\n")
    with suppress(OSError):  # Linux's way to say that the other side is closed
        while os.read(ours, 4096):
            pass
    assert process.wait(10) == 0
    os.close(ours)
    assert one_shell.holds("7B", "13B")


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if shellcheck is None:
        pytest.skip("no shellcheck on this machine")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nothing_in_the_script_is_newer_than_bash_3_2():
    code = re.sub(r"(?m)(^|\s)#.*$", "", SCRIPT.read_text())
    newer = (
        r"mapfile|readarray|declare -[An]|local -[An]|\$\{\w+(,|\^|@)|&>>|\|&|;;?&|coproc|\[-1\]"
    )
    assert re.search(newer, code) is None
    assert "<<" not in code  # a here-document would put the link in a file there
