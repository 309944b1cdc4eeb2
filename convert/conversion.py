"""`convert`: from a checkpoint in any layout to an MLX checkpoint, a few megabytes at a time."""

from pathlib import Path
from typing import Unpack

from mlx_qwen.checkpoint.known import repository_named
from mlx_qwen.checkpoint.names import parameter_count
from mlx_qwen.declared import check_keywords, check_value, chosen, takes
from mlx_qwen.errors import ConversionError

from .comparison import Comparison, check_verifiable, verify_conversion
from .description import Description
from .formats import keeps_codes
from .job import Job, plan_job, survey_source
from .measures import Cost, measured_cost
from .model_folder.upload import check_upload, upload_folder
from .options import ConversionKeywords, ConversionOptions, DescriptionKeywords, DescriptionOptions, check_settings
from .report import ConversionReport
from .settings import Settings
from .source.origin import Reading, check_streaming, open_origin
from .work.write import Written, source_bytes
from .writing.room import check_space, check_writable
from .writing.staging import DOWNLOADS, check_apart, check_target, check_workspace, real_target, staged, work_folder


@takes(ConversionOptions)
def convert(
    hf_path: str | Path, mlx_path: str | Path = "mlx_model", **options: Unpack[ConversionKeywords]
) -> ConversionReport:
    """Convert a checkpoint to MLX, by default quantized to 4.6 bits a weight, with more for what is sensitive.

    Sources may also be FP8, or quantized for another runtime: see `mlx_qwen.convert.formats`.

    Reads, packs and writes pieces of a few megabytes, so that memory stays the same for every size of checkpoint. The
    output appears under its name only when it is complete. Until then it grows in `<mlx_path>.partial`, where a
    conversion that was interrupted, killed or ran out of disk is gone on with when the same one is asked for again.
    The same input always gives the same weights. Whether the target can be written, and the disks have room for it and
    for the download, is found out before the weights of a repository are downloaded.

    Args:
        hf_path: a folder in Hugging Face or MLX layout, a Hub repository, or a released size such as "9B".
        mlx_path: the folder to write.
        {options}

    Returns:
        What was done: sizes, time, memory and every tensor worth a remark.

    Raises:
        ConfigError: the source's config.json is missing or describes no model of this family.
        CheckpointError: the source's files are missing, damaged or do not match its config.
        ConversionError: an option is unknown or of the wrong type, options contradict each other, the target cannot be
            written, or the source holds weights that are NaN or infinite.
    """
    check_value("hf_path", hf_path, str | Path, error=ConversionError)
    check_value("mlx_path", mlx_path, str | Path, error=ConversionError)
    check_keywords(options, ConversionOptions, error=ConversionError)
    hf_path = repository_named(hf_path)
    return _convert(hf_path, real_target(Path(mlx_path).expanduser()), chosen(ConversionOptions, options))


@takes(DescriptionOptions)
def describe(hf_path: str | Path, **options: Unpack[DescriptionKeywords]) -> Description:
    """What `convert` would write with the same options: its tensors by kind and precision, and what the work needs.

    Of the weights only those are read that a `target_size`, the dtype "auto" or, of a folder, the bits of the default
    depend on. Raises as `convert` does.

    Args:
        hf_path: a folder in Hugging Face or MLX layout, a Hub repository, or a released size such as "9B".
        {options}
    """
    check_value("hf_path", hf_path, str | Path, error=ConversionError)
    check_keywords(options, DescriptionOptions, error=ConversionError)
    asked = chosen(DescriptionOptions, options)
    settings = check_settings(asked)
    origin = open_origin(repository_named(hf_path), asked.revision, "files" if settings.reads_values else "headers")
    survey = survey_source(origin, settings).downloaded(settings)
    return plan_job(survey, settings, asked.progress, download=origin.download_bytes(stream=False)).description


def _convert(hf_path: str | Path, target: Path, options: ConversionOptions) -> ConversionReport:
    settings = check_settings(options)
    text = None if options.verify_text is None else Path(options.verify_text).expanduser()
    check_target(target, overwrite=options.overwrite)
    check_workspace(target)
    if not options.dry_run:
        check_writable(target)
    repository = None if options.upload is None else check_upload(options.upload)
    if options.stream_from_hub:
        check_streaming(hf_path, settings, verify=options.verify)
    reading = _reading(settings, dry_run=options.dry_run, stream=options.stream_from_hub)
    origin = open_origin(hf_path, options.revision, reading, work_folder(target) / DOWNLOADS)
    survey = survey_source(origin, settings)
    check_apart(target, survey.source)
    if options.verify:
        check_verifiable(survey.source, survey.config, text)
    if origin.is_to_come:
        check_space(target, survey.most_bytes(settings), download=origin.download_bytes(stream=False))
        survey = survey.downloaded(settings)
    download = survey.origin.download_bytes(stream=options.stream_from_hub)
    job = plan_job(survey, settings, options.progress, verify=options.verify, download=download)
    if options.announce is not None:
        options.announce(job.description)
    if options.stream_from_hub:
        check_space(target, job.output_bytes + download)
    else:
        check_space(target, job.output_bytes, download=download)
    if options.dry_run:
        return _report(job, target, Written(), Cost(), dry_run=True)
    return _done(job, target, options, text, repository)


def _done(
    job: Job, target: Path, options: ConversionOptions, text: Path | None, repository: str | None
) -> ConversionReport:
    """Write the job's output, compare and upload it as `options` ask."""
    cost_so_far, quality, survey = measured_cost(), None, job.survey
    with staged(target, job.fingerprint, resume=options.resume, overwrite=options.overwrite) as space:
        written = job.write(space, options.progress)
        cost = cost_so_far()
        if options.verify:
            reference = survey.origin.repository or survey.source.resolve().name
            quality = verify_conversion(
                survey.source,
                space.folder,
                reference=reference,
                name=target.name,
                text=text,
                progress=options.progress,
                adapter_path=options.adapter_path,
            )
    url = None if repository is None else upload_folder(target, repository)
    return _report(job, target, written, cost, quality=quality, url=url)


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
        source=job.survey.source,
        description=job.description,
        quantization=job.settings.quantization,
        dtype=job.outputs.dtype,
        source_bytes=source_bytes(job.survey.plan),
        output_bytes=job.outputs.nbytes,
        parameters=parameter_count(target.spec for target in job.survey.plan.targets),
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
