"""`convert`: from a checkpoint in any layout to an MLX checkpoint, a few megabytes at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path

from mlx_qwen.checkpoint.layout import Mode, parameter_count
from mlx_qwen.errors import ConversionError

from .comparison import Comparison, check_verifiable, verify_conversion
from .description import Description
from .formats import keeps_codes
from .job import Job, plan_job
from .measures import Cost, measured_cost
from .model_folder.upload import check_upload, upload_folder
from .preview import check_before_download
from .report import ConversionReport
from .settings import AskedDType, Quantizer, Settings, check_settings
from .source.origin import Reading, check_streaming, open_origin
from .work.write import Written, source_bytes
from .writing.room import check_space, check_writable
from .writing.staging import DOWNLOADS, check_apart, check_target, check_workspace, staged, work_folder


def convert(
    hf_path: str | Path,
    mlx_path: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: Mode | None = None,
    recipe: str | None = None,
    bits_for: Mapping[str, int | str] | None = None,
    target_size: int | str | None = None,
    dtype: AskedDType | None = None,
    chip: str | None = None,
    quantizer: Quantizer | None = None,
    calibration: str | Path | None = None,
    quantize: bool = True,
    dequantize: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    revision: str | None = None,
    stream_from_hub: bool = False,
    verify: bool = False,
    verify_text: str | Path | None = None,
    upload: str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
    announce: Callable[[Description], None] | None = None,
) -> ConversionReport:
    """Convert a checkpoint to MLX, by default quantized to 4 bits, with 8 for what is sensitive.

    Sources may also be FP8, or quantized for another runtime: see `mlx_qwen.convert.formats`.

    Reads, packs and writes pieces of a few megabytes, so that memory stays the same for every size of checkpoint. The
    output appears under its name only when it is complete. Until then it grows in `<mlx_path>.partial`, where a
    conversion that was interrupted, killed or ran out of disk is gone on with when the same one is asked for again.
    The same input always gives the same weights. Whether the target can be written, and the disks have room for it and
    for the download, is found out before the weights of a repository are downloaded.

    Args:
        hf_path: a folder in Hugging Face or MLX layout, or a Hub repository.
        mlx_path: the folder to write.
        bits: bits per weight of most matrices alike: 2, 3, 4, 5, 6 or 8. By default the mode's own, 4 for affine.
        group_size: how many weights share a scale: 32, 64 or 128. By default the mode's own, 64 for affine.
        mode: "affine", or "mxfp4", "nvfp4" or "mxfp8", whose bits and group size are fixed.
        recipe: instead of bits and mode, which matrix gets which, by name: see `mlx_qwen.convert.RECIPES`. Without any
            of the three "mixed-4-8": 8 bits for embeddings, head, attention of both kinds, shared experts, routers
            and MTP, 4 for MLPs and experts.
        bits_for: precision of single matrices before all else: from a regular expression, searched for in their MLX
            names, to bits as 8, bits and group size as "8,32", a mode, or "none" to leave them unpacked. The last
            pattern that matches counts. The vision tower is packed by patterns that name it only: {"vision": 8}.
        target_size: instead of a recipe, the most that the weight files may take, in bytes or as "16GB" (10^9 each):
            bits are chosen for each matrix by its measured error, and with a calibration text by that of its outputs;
            see `fitted_recipe`.
        dtype: what unpacked weights, scales and biases become; the source's own by default. A_log stays in float32.
            "auto" is float16 for M1 and M2, if the weights fit, and bfloat16 otherwise.
        chip: the one that "auto" is for, such as "M2 Pro"; this machine's by default.
        quantizer: how codes are found. "search", the default, fits scale and bias of each group so that the weights
            lose least, up to 6 bits, above which that gains next to nothing; "gptq" rounds such that the outputs of the
            matrices on a calibration text change least, which takes the time of some runs of the model; "rtn" takes the
            nearest codes, as mlx-lm does.
        calibration: the text for "gptq", which it chooses: a file, plain or .jsonl with a "text" or "messages" a line,
            or "default" for the one that comes with mlx-qwen.
        quantize: False writes every matrix unpacked (an MLX-quantized source is unpacked).
        dequantize: the same, and insists that the source is quantized, for MLX or for another runtime.
        overwrite: replace an existing model folder, once the new one is complete.
        resume: False starts afresh, and removes what an unfinished conversion to `mlx_path` left.
        revision: branch, tag or commit of the Hub repository.
        stream_from_hub: download the repository's shards one after the other, and remove each once it was converted, so
            that the disk never holds two copies: it needs room for the output and two shards.
        verify: compare the output with the source before it gets its name, as `compare` does with the text that comes
            with mlx-qwen; the report and the model card say what that shows. Takes the time of a run of both models.
        verify_text: a file of UTF-8 text to compare on instead, of which 4,096 tokens are read.
        upload: a Hub repository to upload the output to, made if need be; whether that is allowed is asked first.
        dry_run: only check and report, without writing. Of a Hub repository, only the headers of the weights are read.
        progress: show a line of progress; by default on a terminal and in a notebook.
        announce: called with what will be written once it is decided, before the work starts.

    Returns:
        What was done: sizes, time, memory and every tensor worth a remark.

    Raises:
        ConfigError: the source's config.json is missing or describes no model of this family.
        CheckpointError: the source's files are missing, damaged or do not match its config.
        ConversionError: the settings contradict each other, the target cannot be written, or the source holds weights
            that are NaN or infinite.
    """
    settings = check_settings(
        bits=bits,
        group_size=group_size,
        mode=mode,
        recipe=recipe,
        bits_for=bits_for,
        target_size=target_size,
        dtype=dtype,
        chip=chip,
        quantizer=quantizer,
        calibration=calibration,
        quantize=quantize,
        dequantize=dequantize,
    )
    if verify_text is not None and not verify:
        raise ConversionError("verify_text only matters with verify. Leave it out, or verify.")
    text = None if verify_text is None else Path(verify_text).expanduser()
    target = Path(mlx_path).expanduser()
    check_target(target, overwrite=overwrite)
    check_workspace(target)
    if not dry_run:
        check_writable(target)
    repository = None if upload is None else check_upload(upload)
    if stream_from_hub:
        check_streaming(hf_path, settings, verify=verify)
    reading = _reading(settings, dry_run=dry_run, stream=stream_from_hub)
    if reading == "files":
        check_before_download(hf_path, revision, settings, target, verify=verify, text=text)
    origin = open_origin(hf_path, revision, reading, work_folder(target) / DOWNLOADS)
    download = origin.download_bytes(stream=stream_from_hub)
    job = plan_job(origin, settings, progress, verify=verify, download=download)
    check_apart(target, job.source)
    if verify:
        check_verifiable(job.source, job.config, text)
    if announce is not None:
        announce(job.description)
    if stream_from_hub:
        check_space(target, job.output_bytes + download)
    else:
        check_space(target, job.output_bytes, download=download)
    if dry_run:
        return _report(job, target, Written(), Cost(), dry_run=True)
    cost_so_far, quality = measured_cost(), None
    with staged(target, job.fingerprint, resume=resume, overwrite=overwrite) as space:
        written = job.write(space, progress)
        cost = cost_so_far()
        if verify:
            reference = origin.repository or job.source.resolve().name
            quality = verify_conversion(
                job.source, space.folder, reference=reference, name=target.name, text=text, progress=progress
            )
    url = None if repository is None else upload_folder(target, repository)
    return _report(job, target, written, cost, quality=quality, url=url)


def describe(
    hf_path: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: Mode | None = None,
    recipe: str | None = None,
    bits_for: Mapping[str, int | str] | None = None,
    target_size: int | str | None = None,
    dtype: AskedDType | None = None,
    chip: str | None = None,
    quantizer: Quantizer | None = None,
    calibration: str | Path | None = None,
    quantize: bool = True,
    dequantize: bool = False,
    revision: str | None = None,
    progress: bool | None = None,
) -> Description:
    """What `convert` would write with the same options: its tensors by kind and precision, and what the work needs.

    Of the weights only those are read that a `target_size` or the dtype "auto" depend on. Raises as `convert` does.
    """
    settings = check_settings(
        bits=bits,
        group_size=group_size,
        mode=mode,
        recipe=recipe,
        bits_for=bits_for,
        target_size=target_size,
        dtype=dtype,
        chip=chip,
        quantizer=quantizer,
        calibration=calibration,
        quantize=quantize,
        dequantize=dequantize,
    )
    origin = open_origin(hf_path, revision, "files" if settings.reads_values else "headers")
    return plan_job(origin, settings, progress, download=origin.download_bytes(stream=False)).description


def _reading(settings: Settings, *, dry_run: bool, stream: bool) -> Reading:
    """How much of a repository has to be on the disk before the work begins."""
    if settings.reads_values:
        return "files"
    return "headers" if dry_run else "stream" if stream else "files"


def _report(
    job: Job,
    target: Path,
    written: Written,
    cost: Cost,
    *,
    dry_run: bool = False,
    quality: Comparison | None = None,
    url: str | None = None,
) -> ConversionReport:
    return ConversionReport(
        path=target,
        source=job.source,
        description=job.description,
        quantization=job.settings.quantization,
        dtype=job.outputs.dtype,
        source_bytes=source_bytes(job.plan),
        output_bytes=job.outputs.nbytes,
        parameters=parameter_count(target.spec for target in job.plan.targets),
        seconds=cost.seconds,
        peak_memory=cost.peak_memory,
        mlx_peak_memory=cost.mlx_peak_memory,
        indivisible=job.outputs.indivisible,
        non_finite=written.non_finite,
        kept_codes=tuple(output.name for output in job.outputs.all if keeps_codes(output.target)),
        rounded_scales=written.rounded,
        dry_run=dry_run,
        url=url,
        quality=quality,
    )
