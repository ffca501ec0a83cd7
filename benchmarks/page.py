"""Writes docs/results.md, and the table of reel-tiny's card, from the rows under benchmarks/results/: `python -P -m reelstep.benchmarks.page`.

The page holds no number that is not in those files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reelstep.benchmarks.harness import shown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARD = ROOT / "engine" / "models" / "weights" / "reel-tiny.md"
TABLE = ("<!-- written by benchmarks/page.py -->\n", "<!-- end -->")

SECTIONS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "engine": (
        "One network call against PyTorch, ONNX Runtime and raw OpenVINO",
        "All contenders in one process, in turn, each after a pause in which the threads of the one before go to sleep. `rel_l2` is the error against "
        "eager float32. `reelstep` is its default on a CPU, OpenVINO; `reelstep, inductor` the same bundle by AOTInductor. "
        "Raw OpenVINO has static shapes and, in bfloat16, "
        "the runtime's own precision hint; ours keeps sums and the first and last product in float32. `wan-block` is two blocks of Wan 2.1 1.3B by "
        "diffusers; `reel-tiny` with two rows is what guidance calls. The targets were 2.2x (float32) and 3.5x "
        "(bfloat16) of eager float32 on "
        "`dit-mid` with `rel_l2` under 5e-3, ahead of every PyTorch contender, and at most 3 % over raw OpenVINO. `share_of_peak` is the bound: "
        "the call's FLOP rate over the best that a 2048 x 2048 product reached in the same run and type; little above 1 is possible. torch.compile gets "
        "the captured graph with our ops taken apart, so that it may fuse all of it.",
        ("model", "rows", "dtype", "contender", "median_s", "p10_s", "p90_s", "ratio_to_eager_f32", "over_raw_openvino", "share_of_peak", "rel_l2"),
    ),
    "engine_avx2": (
        "The same on a CPU without bfloat16",
        "All the contenders in float32, on a CPU whose widest instructions are AVX2. On `wan-block` ONNX Runtime is ahead of `reelstep`.",
        ("model", "rows", "contender", "median_s", "p10_s", "p90_s", "ratio_to_eager_f32", "over_raw_openvino", "share_of_peak", "rel_l2"),
    ),
    "quantised": (
        "8 bits against bfloat16",
        "Through our engine, in turn. The aims were 1.5 with at least 35 dB on videos. PSNR and SSIM are of held-out requests' "
        "results, to float32 ones from the same noise: of all tasks, and of videos alone. `dit-mid` and `wan-block` have random weights, so nothing is said of "
        "their videos. Both products of attention count as one layer of `int8`.",
        ("model", "rows", "layers", "quantised", "kept", "median_s", "ratio_to_bfloat16", "rel_l2", "weights_mb", "psnr_db", "video_psnr_db", "video_ssim"),
    ),
    "gpu_check": (
        "A GPU against its own ceilings",
        "`share` is of the copy for what memory bounds, of the large product for the rest; a block's is of the data sheet's peak, as MFU is. Shapes are a "
        "block's of Movie Gen 30B at 73,728 tokens. Errors are of the values, those of `correctness` against twice the formula's own and one rounding "
        "(the example that comes nearest to it). On the CPU one core captured a model meanwhile; beside `end to end` engines were built and other tests ran.",
        ("part", "what", "seconds", "rate", "unit", "share", "aim", "error", "allowed", "right", "note"),
    ),
    "gpu_end_to_end": (
        "reel-tiny on a GPU once more",
        "Its last part on another such machine, beside the build of a bundle.",
        ("part", "what", "seconds", "rate", "unit", "share", "error", "allowed", "right", "note"),
    ),
    "gpu_h100": (
        "An H100 against its own ceilings",
        "Before `forward` and `end to end` were among the parts. In `correctness` the nearest to its bound is an example without values: 0.",
        ("part", "what", "seconds", "rate", "unit", "share", "aim", "error", "allowed", "right", "note"),
    ),
    "gpu_h100_forward": (
        "The whole of Movie Gen 30B on an H100",
        "A forward of all 48 blocks on random weights; its share is of the data sheet's peak.",
        ("part", "what", "seconds", "rate", "unit", "share", "note"),
    ),
    "gpu_h100_kernels": (
        "The kernels once more on an H100",
        "After they were changed; the run was stopped in the next part.",
        ("part", "what", "seconds", "rate", "unit", "share", "aim", "note"),
    ),
    "startup": (
        "From a command to its result",
        "Interpreter and imports included. The aim was a first result in under 2 s with engines in the cache.",
        ("command", "model", "cache", "median_s", "p10_s", "p90_s", "rounds"),
    ),
    "lora": (
        "LoRA with each request against none",
        "The same call of the denoiser without adapters and with one among the inputs of each row, rank 8, through our engine. Errors are to eager float32 "
        "with the adapters fused into the weights. `joining` is what it costs to put the rows of a batch together.",
        ("rows", "plain_ms", "adapted_ms", "adapted_over_plain", "joining_ms", "packed_mb", "plain_rel_l2", "adapted_rel_l2"),
    ),
    "animation": (
        "Held-out sticker animations",
        "A conditioned animation has one right answer. PSNR against it, mean over clips; `repeat` shows the input picture eight times, `ceiling` is "
        "the true animation through the autoencoder and back. The aims were 6 dB above repeat and at most 4 dB below the ceiling.",
        ("motion", "clips", "repeat_db", "model_db", "model_sd_db", "ceiling_db", "above_repeat_db", "below_ceiling_db"),
    ),
    "steps": (
        "Solvers and guidance by velocities",
        "Videos from words against the exact solution from the same noise (RK45, float32, full guidance), through the compiled engine in its own precision. "
        "Solvers under full guidance, rules of guidance with the task's own solver; `bns_N` is fitted to the model, with other prompts and noise. "
        "Stochastic solvers go elsewhere by design, and `lcm` and `tcd` are for distilled networks. `ssim_cfg` is the likeness to the same solver under full "
        "guidance, `stop` the time at which a rule ends it, `frechet` the distance to the exact videos as a set. `seconds` are of one sample, eight at once.",
        ("solver", "guidance", "stop", "nfe", "forwards", "psnr_db", "psnr_sd_db", "ssim", "ssim_sd", "ssim_cfg", "frechet", "frechet_sd", "seconds"),
    ),
    "steps_more": (
        "The other solvers and rules of guidance",
        "The same comparison for the solvers and rules that the table above leaves out, and for a threshold of `adaptive` calibrated since. Rules that end "
        "guidance at a time, with several such times. `bespoke_8` is of a shorter fit than the one that is shipped, which the next table has.",
        ("solver", "guidance", "stop", "nfe", "forwards", "psnr_db", "psnr_sd_db", "ssim", "ssim_sd", "ssim_cfg", "frechet", "frechet_sd", "seconds"),
    ),
    "steps_adaptive": (
        "Adaptive guidance on a schedule that is late",
        "Half of its steps reach t = 0.625, so guidance that is dropped after half of them has held for longer. The threshold is of other prompts. The "
        "aim was `ssim_cfg` of 0.95, the likeness to full guidance by the same steps, with three quarters of its forwards; full guidance is the first row.",
        ("solver", "guidance", "stop", "nfe", "forwards", "psnr_db", "psnr_sd_db", "ssim", "ssim_sd", "ssim_cfg", "frechet", "frechet_sd", "seconds"),
    ),
    "pictures": (
        "Pictures from words by velocities",
        "The comparison of videos above, for single pictures, to which no solver is fitted.",
        ("solver", "nfe", "forwards", "psnr_db", "psnr_sd_db", "ssim", "ssim_sd", "frechet", "frechet_sd", "seconds"),
    ),
    "animations": (
        "Sticker animations by velocities",
        "The comparison of videos above, for stickers that the model made of the same prompts and now animates, at scale 1, where a velocity is one forward. "
        "No solver is fitted to it.",
        ("solver", "nfe", "forwards", "psnr_db", "psnr_sd_db", "ssim", "ssim_sd", "frechet", "frechet_sd", "seconds"),
    ),
    "bespoke": (
        "Bespoke between training-free and BNS",
        "Three solvers with 8 velocities, and midpoint, which the Bespoke one is made from.",
        ("solver", "nfe", "forwards", "psnr_db", "psnr_sd_db", "ssim", "ssim_sd", "frechet", "frechet_sd", "seconds"),
    ),
    "flash": (
        "The student of one to three steps",
        "`reel-tiny-flash` against its teacher by Frechet distances of sets of videos. To data: clips such as the teacher learned from, the way FIDs of "
        "students are published; `over_teacher` is by the teacher's own distance, and the aim was 1.1 with three steps. To the teacher's videos of the same "
        "prompts from other seeds: the first row is then the floor, what two sets of its seeds lie apart. `untouched` is the teacher itself in as few steps.",
        ("contender", "steps", "forwards", "to_data", "to_data_sd", "over_teacher", "to_teacher", "to_teacher_sd", "over_floor", "seconds", "noise_correction"),
    ),
    "sticker": (
        "A sticker animation end to end over gRPC",
        "From a PNG to an MP4 in the client's hands: 8 frames of 64x64, default solver and guidance. `everything else` is decoding the PNG, "
        "encoding the MP4, gRPC and the scheduler. Its quality is the table above: the same requests.",
        ("stage", "median_s", "p10_s", "p90_s", "share"),
    ),
    "concurrency": (
        "Sixteen requests at once",
        "The same requests one after the other and all together. `batches` lists rows x times of the denoiser's calls. The pixel difference is "
        "between the two ways: on a CPU rows run side by side, each by itself.",
        ("clients", "requests", "median_s", "requests_per_s", "ratio_to_one_at_a_time", "mean_rows", "batches", "largest_pixel_difference"),
    ),
    "deadlines": (
        "Deadlines that choose the steps",
        "The same arrivals of videos at one server, each with a deadline of 4 times what one request of quality `best` takes alone, asking for `best`, for "
        "`auto` and for `draft`. Load 1 is what the server does one `best` request at a time. `attainment` is the share done in time, `psnr_db` the mean of "
        "the menu's numbers over those, and the last three columns are shares of all requests, by what they ran as.",
        ("load", "asked", "attainment", "goodput_per_s", "p50_s", "p95_s", "expired", "psnr_db", "draft", "standard", "best"),
    ),
    "context_parallel": (
        "One Movie Gen block of 73,728 tokens over ranks",
        "Processes on one CPU, float32. `activation_mb` is the most that a rank held above its weights and inputs, counted tensor by tensor; the aims were "
        "0.55 of one rank's with two and 0.3 with four. `sent_mb` is counted at the collectives of rank 0. All share two cores, so `seconds` show no speed-up.",
        ("mesh", "ranks", "activation_mb", "sent_mb", "formula_mb", "rel_error", "seconds"),
    ),
    "piecewise": (
        "What collectives cost a rank beside what travels",
        "One rank of tp=2 over links that carry nothing, against the same graph without collectives: cut at them (`pieces`), and with them inside the engine, "
        "which is how ranks on OpenVINO run. The aim was an overhead of at most 3 %.",
        ("model", "tokens", "pieces", "whole_s", "pieces_s", "overhead", "inside_s", "inside_overhead", "inside_rel_l2", "rounds"),
    ),
    "replicas": (
        "Two replicas on a local Ray cluster",
        "Nodes of one core each. The aim was 1.8 times the throughput of one, and no lost request under kills.",
        ("replicas", "kills", "requests", "median_s", "requests_per_s", "ratio_to_one", "lost", "calls_run_again", "largest_pixel_difference"),
    ),
    "overhead": (
        "Overhead without the network",
        "On the `null` backend, which computes nothing.",
        ("where", "steps", "calls", "per_request_ms"),
    ),
}


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A table."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(shown(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def section(name: str) -> str:
    """Heading, words, table, command and conditions of one benchmark."""
    title, words, columns = SECTIONS[name]
    data = json.loads((RESULTS / f"{name}.json").read_text())
    c = data["conditions"]
    extra = {k: shown(v) for k, v in data.items() if k not in ("benchmark", "conditions", "rows")}
    notes = "".join(f" {key}: {value}." for key, value in extra.items())
    versions = ", ".join(f"{k} {v}" for k, v in c["versions"].items())
    return (
        f"## {title}\n{words}\n\n{markdown(data['rows'], columns)}\n\n"
        f"`{c['command']}`.{notes}\n{machine(c)}, {c['cores']} cores, Python {c['python']}, {versions}, commit {c['commit']}, "
        f"seed {c['seed']}, {c['time']}.\n"
    )


def machine(conditions: Mapping[str, Any]) -> str:
    """Rows from before instruction sets were written down have none."""
    arch = f" ({conditions['arch']})" if "arch" in conditions else ""
    return str(conditions.get("gpu", conditions["machine"] + arch))


def refresh_card() -> None:
    """Put the newest held-out rows between the marks in the card."""
    begin, end = TABLE
    head, rest = CARD.read_text().split(begin)
    tail = rest.split(end)[1]
    data = json.loads((RESULTS / "animation.json").read_text())
    CARD.write_text(f"{head}{begin}{markdown(data['rows'], SECTIONS['animation'][2])}\n\n`{data['conditions']['command']}`\n{end}{tail}")


def main() -> None:
    intro = (
        "# Results\nEvery number here was measured by the command under its table and is written from `benchmarks/results/` by "
        "`python -P -m reelstep.benchmarks.page`. The machines are shared: read the ratios, not the seconds.\n"
    )
    page = "\n".join([intro, *(section(name) for name in SECTIONS if (RESULTS / f"{name}.json").exists())])
    (ROOT / "docs" / "results.md").write_text(page)
    refresh_card()
    print(f"wrote {ROOT / 'docs' / 'results.md'} and the table of {CARD}")


if __name__ == "__main__":
    main()
