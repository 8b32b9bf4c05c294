"""`cdm-fast plot`, `replay`, `convert` and `doctor`."""

from pathlib import Path

from cdm_fast.cli import arguments, doctor
from cdm_fast.cli.outcome import Outcome, data_for, load_on
from cdm_fast.interop.convert import PUBLIC_BETAS, convert
from cdm_fast.model.classifier import Classifier
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.training.replay import replay
from cdm_fast.training.report import write_level_pictures, write_loss_curves


def plot_command(command: arguments.Plot) -> Outcome:
    """`cdm-fast plot`."""
    config = read_config(command.run)
    data = data_for(command.run, config, command.split)
    model = load_on(command.run, command.device)
    paths = [] if isinstance(model, Classifier) else write_level_pictures(model, data, command.run)
    if (command.run / "log.jsonl").exists():  # a converted run has none
        paths += write_loss_curves(command.run)
    return Outcome({"run": str(command.run), "pictures": [str(path) for path in paths]}, [*map(str, paths)])


def replay_command(command: arguments.Replay) -> Outcome:
    """`cdm-fast replay`."""
    found = replay(command.run, command.step, device=command.device, out=command.out)
    verdict = "finite" if found["finite"] else "not finite: training skips it"
    lines = [
        f"step {found['step']} (seed {found['seed']}), from the checkpoint of step {found['from_step']}: loss"
        f" {found['loss']:.6g}, CE {found['ce']:.6g}, MSE {found['mse']:.6g}, gradient norm"
        f" {found['grad_norm']:.6g}, {verdict}",
        *(f"gradient norm {row['grad_norm']:.6g} of {row['name']}" for row in found["parameters"]),
        *(
            f"loss {row['loss']:.6g} of training image {row['index']} at level {row['level']}"
            + ("" if row["label"] is None else f", label {row['label']}")
            for row in found["images"]
        ),
    ]
    return Outcome(found, lines)


def convert_command(command: arguments.Convert) -> Outcome:
    """`cdm-fast convert`."""
    out = command.out or Path("runs") / command.file.stem
    betas = None
    if (command.beta_start, command.beta_end) != (None, None):
        start, end = command.beta_start, command.beta_end
        betas = (PUBLIC_BETAS[0] if start is None else start, PUBLIC_BETAS[1] if end is None else end)
    converted = convert(
        command.file, out, schedule=command.schedule, betas=betas, image_size=command.image_size
    )
    assumed = f"assumed: {', '.join(converted.assumed)}"
    return Outcome(converted.to_json(), [f"{out}: {converted.num_parameters:,} parameters", assumed])


def doctor_command(command: arguments.Doctor) -> Outcome:
    """`cdm-fast doctor`."""
    found = doctor.report()
    return Outcome(found, doctor.render(found).splitlines())
