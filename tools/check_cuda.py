"""What the compiler made of the CUDA kernels: ``python tools/check_cuda.py [extension]``.

Reads the built extension (or any file that cuobjdump reads) and fails unless
  - it holds machine code for every architecture it was built for, and PTX of the newest;
  - the kernels of the common shapes use no local memory: nothing spilled, no arrays with addresses;
  - the single-precision kernels have no double-precision instruction.
Needs cuobjdump: the toolkit's, or ``pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The single-precision kernels, and what they call, by their mangled names. The Dirichlet law's closed forms are none:
# they are double precision for every type, as on the CPU (cuda/dirichlet.cu says why).
SINGLE = re.compile(
    r"draw_kernel|draw_walking|marginals_kernel|gradient_kernel|scaled_pass|mode_kernelIf"
    r"|(gumbel|plackett_luce|relaxed)_\w*kernelIf"
    r"|(gamma_sample|gamma_backward|gamma_grad|dirichlet_sample|dirichlet_backward)_kernelIf|dirmoe_\w*kernelIf"
)
# Kernels of double precision that use no local memory either.
WIDE = re.compile(r"(gamma_\w+|dirichlet_\w+)_kernelId|closed_form_\w*kernel|dirmoe_\w*kernelId")
DOUBLE = re.compile(r"\bD(FMA|ADD|MUL|SETP|MNMX|MMA)\b|\.F64|64H\b")
KERNELS = 2 * 3 + 2  # draw, marginals and gradient for k up to 4 and 8; mode for up to 256 and 1024 experts
KERNELS += 2 * 5 + 1  # the Gumbel family for up to 256 and 1024 experts; gates for any
KERNELS += 5  # the Gamma and Dirichlet family
KERNELS += 2  # DirMoE routing, forward and backward


def find_cuobjdump() -> str:
    """The toolkit's, or that of the wheels (where nvdisasm lies beside it)."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    for place in (shutil.which("cuobjdump"), f"{home}/bin/cuobjdump", *map(str, wheels.glob("*/bin/cuobjdump"))):
        if place and Path(place).exists():
            return place
    sys.exit("check_cuda: no cuobjdump; install the CUDA toolkit, or nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")


def dump(tool: str, *arguments: str) -> str:
    """What cuobjdump says."""
    environment = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ.get('PATH', '')}"}
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"check_cuda: {tool} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def local_memory(usage: str) -> list[str]:
    """Complaints about stack or local memory of the kernels named above, from ``cuobjdump -res-usage``."""
    found = []
    for name, rest in re.findall(r"Function (\S+):\s*\n?\s*(REG:.*)", usage):
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", rest)}
        if (SINGLE.search(name) or WIDE.search(name)) and (used["STACK"] or used["LOCAL"]):
            found.append(f"{name}: {used['STACK']} bytes of stack, {used['LOCAL']} of local memory")
    return found


def double_precision(sass: str) -> tuple[int, list[str]]:
    """How many single-precision kernels the disassembly has, and the double-precision instructions in them."""
    seen, found, inside = 0, [], ""
    for line in sass.splitlines():
        if "Function :" in line:
            name = line.split("Function :")[1].strip()
            inside = name if SINGLE.search(name) else ""
            seen += bool(inside)
        elif inside and DOUBLE.search(line.split("/* 0x")[0]):
            found.append(f"{inside}: {line.split('*/')[1].split(';')[0].strip()}")
    return seen, found


def check(path: str, expected: list[str]) -> list[str]:
    """All complaints about a file that should hold these architectures ("9.0", "12.0+PTX")."""
    tool = find_cuobjdump()
    numbers = [architecture.removesuffix("+PTX").replace(".", "") for architecture in expected]
    listed = dump(tool, "-lelf", path)
    complaints = [f"no machine code for sm_{n}" for n in numbers if not re.search(rf"\.sm_{n}\.cubin", listed)]
    if complaints:
        return complaints
    if any(architecture.endswith("+PTX") for architecture in expected) and ".ptx" not in dump(tool, "-lptx", path):
        complaints.append("no PTX")

    def one(number: str) -> list[str]:
        found = local_memory(dump(tool, "-arch", f"sm_{number}", "-res-usage", path))
        seen, doubles = double_precision(dump(tool, "-arch", f"sm_{number}", "-sass", path))
        if seen < KERNELS:
            found.append(f"only {seen} single-precision kernels found, of {KERNELS}")
        return [f"sm_{number}: {complaint}" for complaint in [*found, *doubles]]

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return complaints + [complaint for group in pool.map(one, numbers) for complaint in group]


def main() -> int:
    """Checks the extension that Python imports, or the file named."""
    from probmoe_ext import _C

    info = _C.build_info()
    if info["cuda"] is None:
        sys.exit("check_cuda: this build has no CUDA kernels; build with nvcc on the PATH, or CUDA_HOME set")
    expected = str(info["cuda_architectures"]).split(";")
    complaints = check(sys.argv[1] if len(sys.argv) > 1 else str(_C.__file__), expected)
    for complaint in complaints:
        print(f"check_cuda: {complaint}")
    if not complaints:
        print(
            f"check_cuda: {', '.join(expected)}: machine code for each, no local memory, no double precision in float"
        )
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
