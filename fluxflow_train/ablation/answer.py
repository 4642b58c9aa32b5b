"""What a study answers, by the rule that its plan fixed before the first run, in words."""

from typing import Any

from fluxflow_train.ablation.plan import Plan

Record = dict[str, Any]


def answer(report: Record, plan: Plan) -> Record:
    """{verdict, headline, sentences, rule}: of the claim where the plan makes one, else of the difference."""
    overall = [row for row in report["comparisons"] if row["size"] is None]
    sentences = [difference_words(row, plan) for row in overall if row["n"]]
    sentences += [ratio_words(row) for row in report["ratios"]]
    if plan.decision.size_ratio is None:
        verdict, headline = of_difference(overall, plan)
    else:
        verdict, headline = of_claim(report["ratios"], overall, plan)
    if report["status"] != "complete" and verdict != "no data":
        missing = report["counts"]["planned"] - report["counts"]["finished"]
        headline += f" {missing} of {report['counts']['planned']} runs have no result."
    return {"verdict": verdict, "headline": headline, "sentences": sentences, "rule": rule(plan)}


def rule(plan: Plan) -> str:
    """The decision rule in words."""
    level = f"{100 * plan.decision.confidence:g} %"
    equal = (
        f"Two arms are equal where the difference in {plan.metric.label} lies within "
        f"±{measured(plan.decision.margin, plan)} by two one-sided t tests over seeds at "
        f"{100 - 100 * plan.decision.confidence:.3g} %; they differ where Holm's adjusted p is below that."
    )
    if plan.decision.size_ratio is None:
        return equal
    claim = f"{plan.decision.size_ratio:g}"
    return (
        f"Supported where, against every baseline, the whole {level} interval of the size ratio is at or above "
        f"{claim}; refuted where, against any, the whole interval (at {level} for all baselines together) is below "
        f"{claim}; undecided otherwise. {equal}"
    )


def of_difference(overall: list[Record], plan: Plan) -> tuple[str, str]:
    known = [row for row in overall if row["n"]]
    if len(known) < len(overall) or not known:
        return "no data", "There are not enough results yet."
    different = [row for row in known if row["verdict"] in ("better", "worse")]
    if different:
        row = min(different, key=lambda row: row["p_holm"])
        return "different", f"Different: {difference_words(row, plan)}"
    if all(row["verdict"] == "equal" for row in known):
        widest = max(known, key=lambda row: abs(row["difference"]))
        return "no difference", f"No difference: {difference_words(widest, plan)}"
    unclear = next(row for row in known if row["verdict"] == "undecided")
    return "undecided", f"Undecided: {difference_words(unclear, plan)}"


def of_claim(ratios: list[Record], overall: list[Record], plan: Plan) -> tuple[str, str]:
    claim = plan.decision.size_ratio
    assert claim is not None
    if not ratios or len(ratios) < len(overall):
        return "no data", "There are not enough results yet for a size ratio against every baseline."
    bounded = [row for row in ratios if row["bounded"] and row["ratio"] is not None]
    refuting = [row for row in bounded if row["high_simultaneous"] is not None and row["high_simultaneous"] < claim]
    if refuting:
        worst = min(refuting, key=lambda row: row["ratio"])
        return "refuted", f"Refuted: {ratio_words(worst)} The claim is {claim:g} or more."
    if len(bounded) == len(ratios) and all(row["low"] >= claim for row in bounded):
        least = min(bounded, key=lambda row: row["ratio"])
        return "supported", f"Supported: {ratio_words(least)} The claim is {claim:g} or more."
    critical = min(bounded, key=lambda row: row["ratio"]) if bounded else ratios[0]
    return "undecided", f"Undecided: {ratio_words(critical)} The claim is {claim:g} or more."


def difference_words(row: Record, plan: Plan) -> str:
    """One comparison as a sentence."""
    where = "" if row["vae"] is None else f" on the {row['vae']} VAE"
    scope = "over all sizes" if row["size"] is None else f"at size {row['size']}"
    words = {"better": "better", "worse": "worse", "equal": "equal within the margin", "undecided": "not told apart"}
    who = f"{row['arm']} against {row['baseline']}{where}, {scope}: {words[row['verdict']]}, "
    value = f"{row['difference']:+.3g} {plan.metric.unit}".strip()
    if row["low"] is None:
        return f"{who}{value} ({row['n']} seed{'s' if row['n'] > 1 else ''}: no interval)."
    detectable = (
        "" if row["detectable"] is None else f"; {row['n']} seeds see {measured(row['detectable'], plan)} or more"
    )
    return f"{who}{value} ({row['low']:+.3g} to {row['high']:+.3g}{detectable})."


def ratio_words(row: Record) -> str:
    """One size ratio as a sentence."""
    where = "" if row["vae"] is None else f" on the {row['vae']} VAE"
    if row["ratio"] is None:
        return f"{row['baseline']}{where} has no size ratio to {row['arm']}: {row['note']}."
    needs = f"{row['baseline']} needs {row['ratio']:.3g} times the size of {row['arm']}{where} for the same quality"
    if not row["bounded"]:
        return f"{needs} ({row['note']})."
    return f"{needs} ({row['low']:.3g} to {row['high']:.3g})."


def measured(value: float, plan: Plan) -> str:
    return f"{value:.3g} {plan.metric.unit}".strip()
