"""What a study answers, by the rule that its plan fixed before the first run, in words."""

from typing import Any

from fluxflow_train.ablation.plan import Plan

Record = dict[str, Any]

WORDS = {
    "better": "better than {}",
    "worse": "worse than {}",
    "equal": "equal to {} within the margin",
    "undecided": "not told apart from {}",
    "no data": "without results beside {}",
}


def answer(report: Record, plan: Plan) -> Record:
    """{verdict, headline, sentences, rule}: of the claim where the plan makes one, else of the difference."""
    overall = [row for row in report["comparisons"] if row["size"] is None]
    claimed = [row for row in overall if row["claimed"]]
    ratios = [row for row in report["ratios"] if row["claimed"]]
    sentences = effects(report["factorial"], plan) + [difference_words(row, plan) for row in overall if row["n"]]
    sentences += [ratio_words(row) for row in report["ratios"]]
    if plan.decision.size_ratio is None:
        verdict, headline = of_difference(claimed, plan)
    else:
        verdict, headline = of_claim(ratios, claimed, plan)
    missing = [run for run in report["runs"] if run["phase"] == "main" and run["status"] != "finished"]
    if missing and verdict != "no data":
        planned = sum(run["phase"] == "main" for run in report["runs"])
        headline += f" {len(missing)} of {planned} runs to compare have no result."
    return {"verdict": verdict, "headline": headline, "sentences": sentences, "rule": rule(plan)}


def rule(plan: Plan) -> str:
    """The decision rule in words."""
    level = f"{100 * plan.decision.confidence:g} %"
    equal = (
        f"Two arms are equal where the difference in {plan.metric.label} lies within "
        f"±{measured(plan.decision.margin, plan)} by two one-sided t tests over seeds at "
        f"{100 - 100 * plan.decision.confidence:.3g} %, even if it is told from 0; otherwise they differ where Holm's "
        "adjusted p is below that, and else are not told apart."
    )
    if plan.decision.size_ratio is None:
        return equal
    claim, arms = f"{plan.decision.size_ratio:g}", ", ".join(plan.decision.against)
    return (
        f"Supported where, against each of {arms}, the whole {level} interval of the size ratio is at or above "
        f"{claim}; refuted where, against any, the whole interval (at {level} for all of them together) is below "
        f"{claim}; undecided otherwise, and wherever the rates of the two differ by more than 5 % or runs of either "
        f"have no result. Other arms are controls and no part of the claim. {equal}"
    )


def of_difference(claimed: list[Record], plan: Plan) -> tuple[str, str]:
    known = [row for row in claimed if row["n"]]
    if len(known) < len(claimed) or not known:
        return "no data", "There are not enough results yet."
    verdicts = {row["verdict"] for row in known}
    if verdicts & {"better", "worse"}:
        verdict = "different"
    else:
        verdict = "no difference" if verdicts == {"equal"} else "undecided"
    if len(known) == 1:
        return verdict, f"{verdict.capitalize()}: {difference_words(known[0], plan)}"
    each = "; ".join(
        f"{WORDS[row['verdict']].format(against(row))} ({row['difference']:+.3g} {plan.metric.unit}".rstrip()
        + (", at another rate)" if row["rates_agree"] is False else ")")
        for row in known
    )
    return verdict, f"{verdict.capitalize()}: {plan.candidate} is {each}."


def of_claim(ratios: list[Record], claimed: list[Record], plan: Plan) -> tuple[str, str]:
    claim = plan.decision.size_ratio
    assert claim is not None
    if not ratios or len(ratios) < len(claimed):
        return "no data", "There are not enough results yet for a size ratio against every baseline."
    target = f"The claim is {claim:g} or more."
    unequal = sorted({row["baseline"] for row in claimed if row["rates_agree"] is False})
    bounded = [row for row in ratios if row["bounded"] and row["ratio"] is not None]
    known = [row for row in ratios if row["ratio"] is not None]
    critical = min(known, key=lambda row: row["ratio"]) if known else ratios[0]
    if unequal:
        who = f"the rate of {plan.candidate} differs by more than 5 % from that of {', '.join(unequal)}"
        return "undecided", f"Undecided: {who}, so quality alone decides nothing."
    if any(row["lost"] for row in ratios):
        return (
            "undecided",
            f"Undecided: runs of these arms failed or are still to come. {ratio_words(critical)} {target}",
        )
    refuting = [row for row in bounded if row["high_simultaneous"] is not None and row["high_simultaneous"] < claim]
    if refuting:
        return "refuted", f"Refuted: {ratio_words(min(refuting, key=lambda row: row['ratio']))} {target}"
    if len(bounded) == len(ratios) and all(row["low"] >= claim for row in bounded):
        return "supported", f"Supported: {ratio_words(critical)} {target}"
    return "undecided", f"Undecided: {ratio_words(critical)} {target}"


def effects(factorial: Record | None, plan: Plan) -> list[str]:
    """The main effects and the interaction of a factorial, a sentence each."""
    if factorial is None:
        return []
    return [
        f"{effect['label']}: {signed(effect, plan)} (p {effect['p']:.2g}, not adjusted)."
        if effect["p"] is not None
        else f"{effect['label']}: {signed(effect, plan)}."
        for effect in factorial["effects"]
    ]


def difference_words(row: Record, plan: Plan) -> str:
    """One comparison as a sentence."""
    scope = "over all sizes" if row["size"] is None else f"at size {row['size']}"
    seen = row["detectable"]
    seeds = f"{row['n']} seed{'s' if row['n'] > 1 else ''}"
    detectable = "" if seen is None else f", {seeds} see {measured(seen, plan)} or more"
    if row["verdict"] == "undecided" and row["needed"] is not None:
        detectable += f" and {row['needed']:.0f} would see the margin"
    rates = ", at rates that differ by more than 5 %" if row["rates_agree"] is False else ""
    return (
        f"{row['arm']} is {WORDS[row['verdict']].format(against(row))} {scope}: {signed(row, plan)}{detectable}{rates}."
    )


def against(row: Record) -> str:
    return row["baseline"] + ("" if row["vae"] is None else f" on the {row['vae']} VAE")


def signed(row: Record, plan: Plan) -> str:
    """A difference with its interval."""
    value = f"{row['difference']:+.3g} {plan.metric.unit}".rstrip()
    return f"{value} (no interval)" if row["low"] is None else f"{value} ({row['low']:+.3g} to {row['high']:+.3g})"


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
    return f"{value:.3g} {plan.metric.unit}".rstrip()
