"""Reports as lines of text."""

from collections.abc import Mapping
from typing import Any

from cdm_fast.data.corruptions import SEVERITIES
from cdm_fast.evaluation.attacks import AttackReport
from cdm_fast.evaluation.classification import ClassReport
from cdm_fast.evaluation.outliers import SCORES, OutlierReport, mean_by_severity
from cdm_fast.evaluation.robustness import CorruptionReport
from cdm_fast.statistics import BINS


def describe_score(score: Mapping[str, Any]) -> list[str]:
    """A single-pass report, given as its JSON values, as lines of text."""
    check = score["ratio_check"]
    lines = [
        f"{_figure(score, 'bits_per_dim')}, unaudited"
        f" ({score['num_images']} {score['split']} images of {score['data']}{_given(score)},"
        f" {score['draws']} draws spread {score['draw_spread']:.4f}, level {score['level']}, single pass,"
        f" {score['protocol']})"
    ]
    if score["warning"] is not None:
        lines.append(f"--protocol {score['protocol']} is {score['warning']}")
    if score["precision_cost"] is not None:
        lines.append(f"{score['precision']} costs {score['precision_cost']:+.4f} bits/dim against fp32")
    if check is not None:
        worst = check["levels"].index(check["worst_level"])
        found = (
            f"worst {check['worst']:.3f} +- {check['log_mean_ratio_stderr'][worst]:.3f}"
            f" at level {check['worst_level']}"
        )
        total = check["sum_bits_per_dim"]
        if total is not None:
            error = check["sum_bits_per_dim_stderr"]
            found += f"; all levels together {total:+.3f} +- {error:.3f} bits/dim"
        lines.append(f"adjacent-level ratio check, |log mean| in nats (0 is ideal): {found}")
    return lines


def describe_ode(ode: Mapping[str, Any]) -> list[str]:
    """An ODE report, given as its JSON values, as lines of text."""
    divergence = f"probes {ode['probe_stderr']:.4f} of it" if ode["probe_stderr"] else "exact divergence"
    lines = [
        f"{_figure(ode, 'bits_per_dim')} by the probability-flow ODE ({ode['num_images']} images"
        f"{_given(ode)}, level {ode['level']}, {ode['path']}, tolerance {ode['tolerance']:g},"
        f" {ode['evaluations']} evaluations, {divergence}; a tenfold tighter tolerance moves it by"
        f" {-ode['tolerance_shift']:+.4f})",
    ]
    if ode["difference"] is not None:
        lines.append(f"single pass minus ODE on the same images: {_figure(ode, 'difference', sign='+')}")
    if ode["levels"]:
        each = (
            f"{t}: {value:+.3f} +- {error:.3f}"
            for t, value, error in zip(
                ode["levels"], ode["difference_at"], ode["difference_at_stderr"], strict=True
            )
        )
        lines.append(f"the same at higher noise levels: {', '.join(each)}")
    if ode["warning"] is not None:
        lines.append(f"warning: {ode['warning']}")
    return lines


def describe_elbo(elbo: Mapping[str, Any]) -> list[str]:
    """A report of the variational bound, given as its JSON values, as lines of text."""
    return [
        f"{_figure(elbo, 'bits_per_dim')} by the variational bound ({elbo['num_images']} images"
        f"{_given(elbo)}, level 0:"
        f" prior {elbo['prior']:.4f}, {len(elbo['steps'])} steps {sum(elbo['steps']):.4f}, reconstruction"
        f" {elbo['reconstruction']:.4f} bits/dim)"
    ]


def describe_audit(report: Mapping[str, Any]) -> list[str]:
    """An audit, given as its JSON values, as lines of text: each figure, log Z, and the normalised figure."""
    z = report["log_z"]
    at = z["levels"].index(report["level"])
    bounds = ", ".join(
        f"{name} {z[key][at]:+.2f} +- {z[f'{key}_stderr'][at]:.2f}"
        for name, key in (
            (f"{z['particles']} particles down", "log_z"),
            (f"{z['particles'] // 2} down", "log_z_half"),
            ("up from data", "log_z_up"),
        )
    )
    return [
        *describe_score(report),
        *describe_ode(report["ode"]),
        *([] if report["elbo"] is None else describe_elbo(report["elbo"])),
        f"log Z of the single-pass density, nats (0 is ideal): {bounds} ({z['runs']} runs of each,"
        f" {len(z['levels'])} levels, {z['moves']} moves a level, acceptance {z['acceptance']:.2f}, smallest"
        f" effective sample {z['smallest_ess']:.2f})",
        f"log2 Z / d = {_figure(report, 'log_z_bits_per_dim', sign='+')}",
        f"{_figure(report, 'audited_bits_per_dim')}, audited: the single pass with its density normalised",
    ]


def describe_denoiser_audit(report: Mapping[str, Any]) -> list[str]:
    """A `DenoiserAudit`, given as its JSON values, as lines of text."""
    lines = describe_ode(report["ode"])
    if report["elbo"] is not None:
        lines += describe_elbo(report["elbo"])
        lines.append(f"bound minus ODE: {_figure(report, 'gap_bits_per_dim', sign='+')}")
    return lines


def _given(report: Mapping[str, Any]) -> str:
    return {"none": "", "label": ", given their labels", "all": ", of all classes"}[report["given"]]


def _figure(values: Mapping[str, Any], key: str, sign: str = "") -> str:
    return f"{values[key]:{sign}.4f} +- {values[f'{key}_stderr']:.4f} bits/dim"


def describe_attack(report: AttackReport) -> list[str]:
    """The report as lines of text."""
    lines = [
        f"{report.attack} in {report.norm}{' on another model' if report.transferred else ''},"
        f" {report.steps} steps, {report.num_images} images: accuracy"
        f" {100 * report.clean_accuracy:.1f} % without attack"
    ]
    for i, budget in enumerate(report.budgets):
        detected = ""
        if report.detection_auroc is not None and report.undetected is not None:
            detected = (
                f", detected by log p(x) with AUROC {report.detection_auroc[i]:.3f}; wrong and undetected"
                f" {100 * report.undetected[i]:.1f} %"
            )
        accuracy = f"{100 * report.accuracy[i]:5.1f} +- {100 * report.accuracy_stderr[i]:.1f} %"
        lines.append(f"  budget {budget:.4f}: {accuracy}{detected}")
    for part, accuracies in (report.accuracy_after or {}).items():
        lines.append(f"  after {part:8} " + " ".join(f"{100 * value:6.1f}" for value in accuracies))
    if report.false_alarms is not None:
        lines.append(f"  (the detector rejects {100 * report.false_alarms:g} % of the clean images)")
    return lines


def describe_accuracy(score: Mapping[str, Any]) -> str:
    """Accuracy with standard error, and calibration error, from the JSON values of a `ClassReport`."""
    return (
        f"accuracy {100 * score['accuracy']:.2f} +- {100 * score['accuracy_stderr']:.2f} %,"
        f" calibration error {100 * score['ece']:.2f} %"
    )


def describe_classes(report: ClassReport) -> list[str]:
    """The report as lines of text."""
    averaged = "scores" if report.method == "denoising" else "log-probabilities"
    draws = f"{report.draws} draws, their {averaged} averaged" if report.draws > 1 else "1 draw"
    if report.trials is not None:
        draws += f", {report.trials} trials"
    if report.level:
        draws += f", at level {report.level}"
    lines = [
        f"accuracy {100 * report.accuracy:.2f} +- {100 * report.accuracy_stderr:.2f} %"
        f" ({report.method}, {report.num_images} {report.split} images of {report.data},"
        f" {report.num_classes} classes, {draws})",
        f"calibration error {100 * report.ece:.2f} % (ECE, {BINS} bins), log loss {report.log_loss:.4f} nats",
    ]
    if report.bits_per_dim is not None:
        lines.append(
            f"{report.bits_per_dim:.4f} +- {report.bits_per_dim_stderr:.4f} bits/dim of the marginal"
            f"{'' if report.method == 'ode' else ', unaudited'}"
        )
    return [*lines, f"{report.images_per_second:.3g} images/s"]


def describe_outliers(report: OutlierReport) -> list[str]:
    """The report as lines of text."""
    lines = [
        f"{report.bits_per_dim:.4f} +- {report.bits_per_dim_stderr:.4f} bits/dim at level {report.level}"
        f" ({report.num_images} images of {report.data}, {report.split}; unaudited)",
        f"typical: {report.reference_bits_per_dim:.4f} ({report.reference_images} images of"
        f" {report.reference}); {100 * report.flagged:.1f} % flagged at {100 * report.false_alarms:g} %"
        " false alarms",
    ]
    other = report.against
    if other is not None:
        lines.append(f"against {other.data}, {other.bits_per_dim:.4f} bits/dim:")
        lines += [
            f"  AUROC {other.auroc[name]:.4f} +- {other.auroc_stderr[name]:.4f} by {_words(name)}"
            for name in SCORES
        ]
    if report.corruptions is not None:
        lines.append(f"against its own {len(report.corruptions)} corruptions, severity 1 to 5, mean AUROC:")
        for name, areas in mean_by_severity(report.corruptions).items():
            lines.append(f"  {_words(name):16}" + " ".join(f"{area:7.4f}" for area in areas))
    return lines


def _words(name: str) -> str:
    return name.replace("_", " ")


def describe_corruptions(report: CorruptionReport) -> list[str]:
    """The report as lines of text."""
    lines = [
        f"corrupted: accuracy {100 * report.mean:.2f} +- {100 * report.mean_stderr:.2f} %"
        f" over {len(report.accuracy)} kinds at {len(SEVERITIES)} severities"
    ]
    for kind, each in report.accuracy.items():
        lines.append(f"  {kind:18}" + " ".join(f"{100 * value:6.1f}" for value in each))
    return lines
