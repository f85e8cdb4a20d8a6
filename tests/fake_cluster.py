"""Stand-ins for pdsh, srun and scontrol that run the commands of all machines on this one.

As with the real programs, processes on the "machines" outlive pdsh: they run in sessions of their own.
"""

import os
import sys
from pathlib import Path

PDSH = """
import subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
assert words[:5] == ["-S", "-N", "-R", "ssh", "-f"], words
commands = [words[-1].replace("%n", str(number)).replace("%h", host) for number, host in enumerate(hosts)]
started = [subprocess.Popen(["bash", "-c", command], start_new_session=True) for command in commands]
sys.exit(max(abs(process.wait()) for process in started))
"""
SRUN = """
import os, signal, subprocess, sys, time
words = sys.argv[1:]
flags = [word for word in words if word.startswith("--")][:4]
count = int(flags[0].removeprefix("--nodes="))
assert flags[1:] == [f"--ntasks={count}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"], flags
command = words[4:]
started = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(number)}, start_new_session=True)
           for number in range(count)]
def end(number, frame):
    for process in started:
        process.terminate()
signal.signal(signal.SIGTERM, end)
worst = 0
while any(process.poll() is None for process in started):
    if not worst and any(process.poll() for process in started):
        end(None, None)
    worst = max([worst, *(abs(process.poll() or 0) for process in started)])
    time.sleep(0.05)
sys.exit(max(abs(process.poll()) for process in started))
"""
SCONTROL = """
import sys
assert sys.argv[1:] == ["show", "hostnames", "fake[1-2]"], sys.argv
print("fake1\\nfake2")
"""


def write_programs(folder: Path) -> dict[str, str]:
    """Write the programs; returns the environment in which they are found."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, code in (("pdsh", PDSH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
