"""Run a benchmark.

    python -m train.benchmark attention                              attention with entropies, against other kernels
    python -m train.benchmark step --config configs/ereg.json        a training step, against a GPT-2 of equal size
    python -m train.benchmark scaling --config configs/ereg_1b.json  layouts over the GPUs of this machine, with peers
    python -m train.benchmark generate --config configs/ereg.json    generated tokens a second, against transformers
    python -m train.benchmark learning --config configs/ereg.json    loss curves of fused kernels and plain formulas

All contenders are measured in one run. Results are medians, written as JSON, a Markdown table and a picture. Each
benchmark has its own --help.
"""

import sys

from data.command_line import print_faults, run_command
from parallel.engine.deepspeed_section import DeepSpeedSectionError
from parallel.processes.lifetime import end_with_launcher
from parallel.processes.place import LaunchError, forget_launcher, is_launched
from train.benchmark import attention as benchmark_attention
from train.benchmark import generate as benchmark_generate
from train.benchmark import learning as benchmark_learning
from train.benchmark import scaling as benchmark_scaling
from train.benchmark import step as benchmark_step
from train.config import ConfigError
from train.start.compiled_code import keep_compiled_code_private

BENCHMARKS = {
    "attention": benchmark_attention.main,
    "step": benchmark_step.main,
    "scaling": benchmark_scaling.main,
    "generate": benchmark_generate.main,
    "learning": benchmark_learning.main,
}


def main(arguments: list[str]) -> int:
    """Return the exit status: 0 done, 1 failed while running, 2 cannot run as asked."""
    if not arguments or arguments[0] not in BENCHMARKS:
        print(__doc__)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    if arguments[0] == "step" and is_launched():
        end_with_launcher()
    else:
        forget_launcher()
    try:
        keep_compiled_code_private()
        return BENCHMARKS[arguments[0]](arguments[1:])
    except (ConfigError, DeepSpeedSectionError, LaunchError) as error:
        print_faults(error)
        return 2


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
