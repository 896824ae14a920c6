"""Conversions and embeddings from and to real servers on loopback: nginx and S3 (moto), with faults; every byte is compared with local ones.

python -m tests.long.object_stores [--images 600] [--moto moto_server]     (minutes; needs Debian's nginx-light, and 'moto[server]' somewhere)

Each fault is shown to have struck: by the server's own count, or by what the command printed while it waited.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.commands import ROOT
from tests.images import write_many
from tests.web_server import WebServer

SECRET = "hidden-word"
ENCODER = ("--checkpoint", str(ROOT / "tests/golden/scenes_encoder.pt"), "--views.size_px", "32", "--workers", "1", "--device", "cpu")
STEPS = ("bytes", "features", "web", "nginx", "s3", "secrets")
LIMIT_S = 600.0


class Server:
    """A server process on a port of loopback."""

    def __init__(self, name: str, command: Callable[[int], list[str]]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name, self._command = name, command
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command(self.port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.1)
        sys.exit(f"{self.name} does not start")

    def send(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process.poll() is None:
            self.send(signal.SIGKILL)
            self._process.wait()


def nginx_command(root: Path, scratch: Path) -> Callable[[int], list[str]]:
    def command(port: int) -> list[str]:
        config = scratch / "nginx.conf"
        config.write_text(
            f"daemon off; worker_processes 2; pid {scratch}/nginx.pid; error_log {scratch}/nginx.log; user root;\n"
            "events { worker_connections 512; }\n"
            f"http {{ access_log off; types {{}} default_type application/octet-stream; server {{ listen 127.0.0.1:{port}; root {root};"
            " autoindex on; } }\n"
        )
        return ["nginx", "-c", str(config), "-e", f"{scratch}/nginx.log"]

    return command


class Commands:
    """Runs fastbyol in processes of its own, with a cache folder of its own, and keeps all that they print."""

    def __init__(self, scratch: Path, s3: Server) -> None:
        self.scratch, self.printed = scratch, ""
        self._environment = os.environ | {
            **{"XDG_CACHE_HOME": str(scratch / "cache"), "AWS_ENDPOINT_URL": s3.url, "AWS_ACCESS_KEY_ID": "name"},
            **{"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1", "PYTHONUNBUFFERED": "1"},
        }

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fastbyol", *map(str, arguments)]
        return subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end(self, process: subprocess.Popen[str], before: str = "") -> tuple[int, str]:
        said = before + process.communicate(timeout=LIMIT_S)[0]
        self.printed += said
        return process.returncode, said

    def run(self, *arguments: str | Path) -> tuple[int, str]:
        return self.end(self.start(*arguments))

    def until(self, process: subprocess.Popen[str], words: str) -> str:
        """Returns what the process prints up to the line with these words."""
        said = ""
        assert process.stdout is not None
        while words not in said and (line := process.stdout.readline()):
            said += line
        return said


def check(what: str, good: bool, detail: str = "") -> None:
    print(f"{'ok   ' if good else 'WRONG'} {what}{': ' if detail else ''}{detail}", flush=True)
    if not good:
        sys.exit(1)


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1][:160]


@contextlib.contextmanager
def servers(scratch: Path, moto: str) -> Iterator[tuple[Server, Server]]:
    nginx = Server("nginx", nginx_command(scratch / "served", scratch))
    s3 = Server("moto", lambda port: [moto, "-H", "127.0.0.1", "-p", str(port)])
    try:
        yield nginx, s3
    finally:
        nginx.kill()
        s3.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--moto", default="moto_server", help="the program of moto[server]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastbyol-stores-") as folder:
        scratch = Path(folder)
        images = write_many(scratch / "served" / "images", images=options.images)
        with tarfile.open(scratch / "served" / "images.tar", "w") as tar:
            tar.add(images, "images")
        with servers(scratch, options.moto) as (nginx, s3):
            commands = Commands(scratch, s3)
            fill_bucket(s3, scratch / "served")
            code, said = commands.run(*convert(scratch / "served/images", scratch / "reference.beton"))
            check("conversion from a local folder", code == 0, last_line(said))
            reference = (scratch / "reference.beton").read_bytes()
            steps = {
                "bytes": lambda: the_same_bytes(commands, nginx, scratch, reference),
                "features": lambda: the_same_features(commands, nginx, scratch),
                "web": lambda: faults_of_a_web_server(commands, scratch, reference),
                "nginx": lambda: nginx_stops(commands, nginx, scratch, reference),
                "s3": lambda: s3_dies_during_an_upload(commands, s3, scratch, reference),
                "secrets": lambda: no_secret_anywhere(commands, nginx, scratch),
            }
            for name in STEPS:
                if name in options.only:
                    steps[name]()


def fill_bucket(s3: Server, served: Path) -> None:
    import fsspec

    store = bucket(s3)
    assert isinstance(store, fsspec.AbstractFileSystem)
    store.mkdir("bucket")
    store.put(f"{served}/", "bucket/", recursive=True)


def bucket(s3: Server):
    import fsspec

    return fsspec.filesystem("s3", key="name", secret=SECRET, client_kwargs={"endpoint_url": s3.url}, use_listings_cache=False)


def convert(data: str | Path, out: str | Path) -> tuple[str, ...]:
    return ("convert", "--data", str(data), "--out", str(out), "--workers", "2", "--flush-every", "0.5")


def the_same_bytes(commands: Commands, nginx: Server, scratch: Path, reference: bytes) -> None:
    sources = {
        "nginx folder": f"{nginx.url}/images",
        "S3 folder": "s3://bucket/images",
        "nginx tar": f"{nginx.url}/images.tar",
        "S3 tar": "s3://bucket/images.tar",
    }
    found = set()
    for number, (name, data) in enumerate(sources.items()):
        started = time.monotonic()
        code, said = commands.run(*convert(data, scratch / f"{number}.beton"))
        check(f"conversion from {name}", code == 0, f"{time.monotonic() - started:.1f} s" if code == 0 else said)
        found.add((scratch / f"{number}.beton").read_bytes())
    check("all conversions are byte-identical to the local one", found == {reference}, f"{len(reference):,} bytes")


def the_same_features(commands: Commands, nginx: Server, scratch: Path) -> None:
    sources = (scratch / "served/images", f"{nginx.url}/images", "s3://bucket/images", f"{nginx.url}/images.tar")
    arrays = []
    for number, data in enumerate(sources):
        code, said = commands.run("embed", *ENCODER, "--data", str(data), "--out", scratch / f"{number}.npz")
        check(f"features of {data}", code == 0, "" if code == 0 else said)
        with np.load(scratch / f"{number}.npz") as held:
            arrays.append(held["feature"].tobytes() + held["label"].tobytes())
    check("all features are byte-identical", len(set(arrays)) == 1)


def faults_of_a_web_server(commands: Commands, scratch: Path, reference: bytes) -> None:
    with WebServer(scratch / "served") as server:
        for fault in ("503", "cut"):
            images = [0]

            def struck_sometimes(method: str, path: str, fault: str = fault, images: list[int] = images) -> str:
                images[0] += method == "GET" and path.endswith(".jpg")
                return fault if method == "GET" and images[0] % 10 == 7 and server.struck[fault] < 10 else ""

            server.fault = struck_sometimes
            out = scratch / f"{fault}.beton"
            code, said = commands.run(*convert(f"{server.url}/images", out))
            check(
                f"{server.struck[fault]} answers were {fault}",
                code == 0 and server.struck[fault] == 10 and out.read_bytes() == reference and "tried again" in said,
                "the same bytes",
            )


def nginx_stops(commands: Commands, nginx: Server, scratch: Path, reference: bytes) -> None:
    process = commands.start(*convert(f"{nginx.url}/images", scratch / "stopped.beton"))
    said = commands.until(process, "images to go")
    nginx.kill()
    time.sleep(12)
    waiting = process.poll() is None
    nginx.start()
    code, said = commands.end(process, said)
    waits = said.count("tried again")
    good = waiting and code == 0 and waits > 0 and (scratch / "stopped.beton").read_bytes() == reference
    check(f"nginx was away for 12 s ({waits} waits told)", good, "the same bytes" if good else said)
    process = commands.start(*convert(f"{nginx.url}/images", scratch / "dead.beton"))
    said = commands.until(process, "images to go")
    nginx.kill()
    started = time.monotonic()
    code, said = commands.end(process, said)
    good = code == 5 and "Traceback" not in said and not (scratch / "dead.beton").exists()
    check(f"nginx was killed for good: exit code {code} after {time.monotonic() - started:.0f} s", good, last_line(said))
    nginx.start()
    code, said = commands.run(*convert(f"{nginx.url}/images", scratch / "dead.beton"))
    check("the same command goes on", code == 0 and (scratch / "dead.beton").read_bytes() == reference, "the same bytes")


def s3_dies_during_an_upload(commands: Commands, s3: Server, scratch: Path, reference: bytes) -> None:
    out = "s3://bucket/out/x.beton"
    process = commands.start(*convert(scratch / "served/images", out))
    said = commands.until(process, "report:")  # complete here; the upload begins
    s3.kill()
    code, said = commands.end(process, said)
    good = code == 5 and "tried again" in said and "Traceback" not in said
    check(f"S3 was killed when the upload began: exit code {code}", good, last_line(said))
    held = [path for path in (scratch / "cache").rglob("x.beton") if path.read_bytes() == reference]
    check("the output is still here", len(held) == 1)
    s3.start()
    bucket(s3).mkdir("bucket")  # moto keeps everything in memory
    code, said = commands.run(*convert(scratch / "served/images", out))
    good = code == 0 and "its upload goes on" in said and bucket(s3).cat("bucket/out/x.beton") == reference and not held[0].exists()
    check("the same command uploads it and removes it here", good, last_line(said))
    code, said = commands.run("verify", out)
    check("verify reads it back", code == 0, last_line(said))


def no_secret_anywhere(commands: Commands, nginx: Server, scratch: Path) -> None:
    url = nginx.url.replace("//", f"//user:{SECRET}@")
    for arguments in (
        convert(f"{url}/images.tar?token={SECRET}", scratch / "secret.beton"),
        convert(f"{url}/none?token={SECRET}", scratch / "none.beton"),
        ("embed", *ENCODER, "--data", f"{url}/images.tar?token={SECRET}", "--out", f"{scratch}/secret.npz"),
        ("evaluate", "labelfree", *ENCODER, "--data", f"{url}/images.tar?token={SECRET}", "--out", f"{scratch}/results"),
        ("info", f"{url}/images.tar?token={SECRET}"),
    ):
        code, said = commands.run(*arguments)
        check(f"{arguments[0]} with a password in the URL", code == (2 if "/none?" in " ".join(arguments) else 0), last_line(said))
    nginx.kill()
    code, said = commands.run("info", f"{url}/images.tar?token={SECRET}")
    check("info with the server away", code == 5, last_line(said))
    shutil.rmtree(scratch / "served")
    (scratch / "nginx.log").unlink()  # the server's own, which notes each request that it refuses
    holders = [path.name for path in scratch.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    said = [line for line in commands.printed.splitlines() if SECRET in line]
    check("no message and no file holds the secret", not said and not holders, f"{len(commands.printed):,} characters {holders} {said[:3]}")


if __name__ == "__main__":
    main()
