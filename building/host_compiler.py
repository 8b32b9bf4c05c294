"""The host compiler: which one there is, and how its name is given to torch and to nvcc.

Both take the values of CXX, CC and NVCC_CCBIN for the name of one program. torch before 2.13 asks the first
word of CXX for its version, takes "ccache" for a compiler that is too old, and refuses to build CUDA kernels;
newer ones quote CXX as a whole; nvcc looks for a program called "ccache gcc". A command of several words is
therefore put into a script, and the variable names the script.

`python -m building.host_compiler` prints the words of the compiler's command, one a line, and fails where
there is no such program.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

_SCRIPTS = {"CXX": "cdm-fast-cxx", "CC": "cdm-fast-cc", "NVCC_CCBIN": "cdm-fast-ccbin"}
_COMPILER_CACHES = ("ccache", "sccache")


def command_in(variable: str) -> list[str]:
    """Words of the command in an environment variable, none if it is empty; an existing path is one word."""
    text = os.environ.get(variable, "").strip()
    if shutil.which(text) or Path(text).is_dir():  # a directory: NVCC_CCBIN may name the compiler's folder
        return [text] if text else []
    try:
        return shlex.split(text)
    except ValueError:  # a quotation mark without its partner
        return text.split()


def compiler_command() -> list[str]:
    """Words of the command that compiles C++: those of CXX, else c++."""
    return command_in("CXX") or ["c++"]


def compiler() -> str | None:
    """Path of the program that compiles C++, the first word of its command; None if there is none."""
    return shutil.which(compiler_command()[0])


def name_in_one_word(
    cpp_extension: Any,  # torch.utils.cpp_extension
    folder: Path,  # where the scripts are written; it goes to the front of PATH
) -> None:
    """Makes CXX, CC and NVCC_CCBIN single words, or unset where they are empty."""
    for variable, script in _SCRIPTS.items():
        words = command_in(variable)
        if variable == "CXX":
            words = _without_cache_of_torch(words, cpp_extension)
        if not words:
            os.environ.pop(variable, None)
        elif len(words) == 1 and " " not in words[0]:
            os.environ[variable] = words[0]
        elif shutil.which(words[0]):
            _write_script(folder.resolve() / script, words)
            os.environ[variable] = script


def _without_cache_of_torch(words: list[str], cpp_extension: Any) -> list[str]:
    """The command without the ccache or sccache that torch, from 2.13 on, puts before the compiler itself."""
    if len(words) < 2 or words[0] not in _COMPILER_CACHES or not hasattr(cpp_extension, "_wrap_compiler"):
        return words
    added = cpp_extension._wrap_compiler("c++")[0]
    return words[1:] if added == words[0] else words


def _write_script(path: Path, words: list[str]) -> None:
    """Writes a script that runs the command with its own arguments, and puts its folder on PATH.

    PATH finds the script by its bare name, so that a space in the folder's own path does no harm.
    """
    text = f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # ccache compares times of compilers
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if str(path.parent) not in folders:
        os.environ["PATH"] = os.pathsep.join([str(path.parent), *folders])


if __name__ == "__main__":
    if compiler() is None:
        sys.exit(1)
    print(*compiler_command(), sep="\n")
