"""A Python that has imported torch, but neither transformers nor depthscope, and forks itself for each program it runs.

A program finds what it would find in a new interpreter: transformers and the Hub's libraries read the variables of its
environment when it imports them, in whatever order it does. Only torch, and what is slow of what they import besides,
does not take its seconds again.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Forks", "new_python"]

SERVER = """
import contextlib, gc, importlib, json, os, runpy, sys, types
for name in sys.argv[1].split():
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.collect()
gc.freeze()
while asked := sys.stdin.readline():
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
words, environment, folder, files = json.loads(asked)
for number, (path, flags) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
    os.dup2(os.open(path, flags), number)
sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
os.environ.clear()
os.environ.update(environment)
os.chdir(folder)
if words[0] == "-m":
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
elif words[0] == "-c":
    sys.argv = ["-c", *words[2:]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(words[1], "<string>", "exec"), main.__dict__)
else:
    sys.argv = words
    sys.path[0] = os.path.dirname(words[0])
    runpy.run_path(words[0], run_name="__main__")
"""
IMPORTED = """torch torch._dynamo torch.distributed.tensor torch.distributed.fsdp torch.distributed.checkpoint
torch.distributed.pipelining torch.nn.attention.flex_attention numpy pandas pyarrow scipy.optimize sklearn.metrics
PIL.Image httpx jinja2 requests safetensors.torch tokenizers yaml"""


class Forks:
    """Runs the programs of one Python, one after the other. Where there is no fork, a new interpreter runs each."""

    def __init__(self, python: Path | str, environment: Mapping[str, str]) -> None:
        self.python, self.environment = str(python), {**environment, "OMP_NUM_THREADS": "1"}
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, *words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run `python WORDS`, which name a module (-m), code (-c) or a file, to the end; `env` is all its variables."""
        arguments, settings = [str(word) for word in words], dict(self.environment if env is None else env)
        if not hasattr(os, "fork"):
            command = [self.python, *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=False, env=settings, cwd=cwd)
        if self._server is None:
            command, pipe = [self.python, "-c", SERVER, IMPORTED], subprocess.PIPE
            self._server = subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, text=True)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as name:
            out, err = Path(name, "out"), Path(name, "err")
            for path in (out, err):
                path.touch()
            asked = [arguments, settings, str(cwd or Path.cwd()), [os.devnull, str(out), str(err)]]
            self._server.stdin.write(json.dumps(asked) + "\n")
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())

    def close(self) -> None:
        """End the process that forks."""
        if self._server is not None:
            self._server.communicate()


HERE = Forks(sys.executable, os.environ)
atexit.register(HERE.close)


def new_python(
    *words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `python WORDS` with the packages of this environment; `env` is all its variables, where they are others."""
    return HERE.run(*words, env=os.environ if env is None else env, cwd=cwd)
