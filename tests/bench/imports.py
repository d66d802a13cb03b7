"Start-up: what it costs to import the package and to ask the command for help, each in a fresh process."
import statistics
import subprocess
import sys

from timing import interleaved, row

COMMANDS = {
    "python -c pass": ([sys.executable, "-c", "pass"], ""),
    "import geoforecast": ([sys.executable, "-c", "import geoforecast"], "<= 0.3"),
    "geoforecast --help": ([sys.executable, "-c", "import sys; from geoforecast.cli import main; sys.exit(main(['--help']))"], "<= 1"),
}


def measure():
    calls = {name: lambda command=command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL) for name, (command, _) in COMMANDS.items()}
    for name, seconds in interleaved(calls).items():
        lo, value, hi = statistics.quantiles(seconds, n=4, method="inclusive")
        yield row("imports", name, COMMANDS[name][1], value, lo, hi, "s, a fresh process")
