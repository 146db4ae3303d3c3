"""`timm-coda explain`: write figures, arrays and tables of explanations."""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._command import add_dataset_options, choose_device, new_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..gallery import Gallery, Row, Source, Strongest

_DESCRIPTION = """\
Explain images and videos: which pixels are evidence for and against a class.
The explanations are exact.

  timm-coda explain photo.jpg --model coda_net_xs.digits --output out
  timm-coda explain photos/ --model runs/mine --target cat --versus dog \\
      --output out                                  # why a cat and not a dog?
  timm-coda explain https://... clip.mp4 --model hf-hub:USER/NAME --top 3 \\
      --output out

For each image, FOLDER gets

  NAME.figure.png   image, most probable classes, maps and their sums
  NAME.overlay.png  evidence over the whole image: red for, blue against; parts
                    that the model does not see (it crops the centre) are dark
  NAME.npz          contributions, weights, logits, ...: read with numpy.load

and for all images together table.csv and, if there are several images, contact
sheets of 48 images each. For each video it gets NAME.overlay.mp4, in which a
colour has the same meaning in every frame, and NAME.overlay.csv, with one row
per frame. A video shows one class: the first --target, or the most probable
class over all frames.

Probabilities are sigmoids. Folders are read with their subfolders, without
hidden files. Transparent parts of an image become white; of an animated image,
the first frame is explained. Files that are damaged, too large, or not an image
or video, or whose results cannot be written, are listed at the end. Exit code:
0 if everything was explained, 1 if files were skipped, 2 if nothing could be
explained.

After Ctrl-C, the table has what was explained, and the same command goes on
where it stopped; it also explains files that were added or changed.

Several processes share the batches of images, on GPUs or CPUs, with the same
results; any number of them goes on. The first one explains the videos.

  accelerate launch --multi_gpu --num_processes 2 -m timm_coda explain ...

With --unit, explain units of inner layers, instead of classes: search a dataset
for the images that activate them most, and draw what they see in these.

  timm-coda explain --unit stages.1:5 stages.2:7 --data digits \\
      --model coda_net_xs.digits --output units.png
"""


def add(subcommands: Any) -> None:
    parser = new_command(
        subcommands,
        "explain",
        "show which pixels of images and videos are evidence for a class",
        _DESCRIPTION,
        _run,
        shared=True,
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="image, video, folder of these, or URL (http, https)")
    add("--model", required=True, metavar="NAME", help="name in timm's registry, folder, or hf-hub:ID")
    hint = "new or empty folder, or one to go on with; with --unit, a new .png, .svg or .pdf file"
    add("--output", required=True, type=Path, metavar="FOLDER", help=hint)
    which = parser.add_mutually_exclusive_group()
    hint = "classes to explain, by name or number (default: the most probable one)"
    which.add_argument("--target", nargs="+", metavar="CLASS", help=hint)
    which.add_argument("--top", type=int, default=1, metavar="N", help="explain the N most probable classes")
    hint = "explain these channels of inner layers by the images of --data that activate them most"
    which.add_argument("--unit", nargs="+", action="extend", metavar="LAYER:CHANNEL", help=hint)
    hint = "explain why the target and not this class; one class, or one for each --target"
    add("--versus", nargs="+", metavar="CLASS", help=hint)
    add("--batch-size", type=int, default=16, metavar="N", help="images per batch, to limit memory (default: 16)")
    add("--device", help="cpu or cuda (default: cuda if available)")
    add("--figure", choices=["png", "svg", "pdf"], default="png", help="file format of figures (default: png)")
    hint = "explain everything again, also into a folder with files, replacing those of the same name"
    add("--overwrite", action="store_true", help=hint)
    group = parser.add_argument_group("images to search, with --unit")
    hint = "digits, Hub dataset id, parquet files, or folder of these or of images"
    group.add_argument("--data", nargs="+", metavar="SOURCE", help=hint)
    group.add_argument("--images", type=int, default=8, metavar="N", help="images to show of each unit (default: 8)")
    add_dataset_options(group, otherwise="all images")


def _run(args: argparse.Namespace) -> int:
    if args.unit:
        return _run_units(args)
    if args.data:
        raise ValueError(f"--data {args.data[0]}: only --unit searches a dataset; give images as INPUT, or add --unit")
    if not args.inputs:
        raise ValueError("nothing to explain: give images, videos, folders or URLs; or --unit and --data")
    from ..gallery import VIDEO_SUFFIXES, Gallery
    from ..hub import claimed

    sources, model, choices = args.processes.in_turn(lambda: _prepare(args))
    with args.processes.held_by_first(claimed(args.output)):
        gallery = Gallery(
            model,
            args.output,
            sources,
            **choices,
            top=args.top,
            batch_size=args.batch_size,
            suffix=f".{args.figure}",
            overwrite=args.overwrite,
            processes=args.processes,
            show=_show,
        )
        if any(source.suffix not in VIDEO_SUFFIXES for source in sources):
            print(f"{'':26} most probable classes (sigmoid)")
        try:
            _explain(sources, gallery)
        except BaseException as error:
            gallery.stop()
            done = f"{gallery.explained} of {len(sources)} explained: {args.output}"
            print(f"\nstopped; {done}; run the same command to go on", file=sys.stderr)
            if not isinstance(error, KeyboardInterrupt):
                raise
            return 130
    if args.processes.rank:
        return 0
    before = f" ({gallery.reused} before)" if gallery.reused else ""
    print(f"\n{gallery.explained} of {len(sources)} explained{before}: {args.output}")
    if gallery.skipped:
        _print_skipped(gallery.skipped)
    return 2 if gallery.explained == 0 else 1 if gallery.skipped else 0


def _print_skipped(lines: "Sequence[str]") -> None:
    print(f"\n{len(lines)} skipped:", file=sys.stderr)
    for line in lines:
        print(textwrap.fill(line, 79, initial_indent="  ", subsequent_indent="    "), file=sys.stderr)


def _prepare(args: argparse.Namespace) -> "tuple[list[Source], Any, dict[str, Any]]":
    """Return the inputs, the model, and the names of its classes with those to explain."""
    from ..explanation import Classes, letters, training_data
    from ..gallery import find_sources

    if args.output.is_file():
        raise ValueError(f"--output {args.output}: not a new or empty folder; name another")
    letters(12)  # a missing library stops the command before the first batch is explained, not after it
    sources = find_sources(args.inputs, args.output)
    model = _load(args)
    classes = Classes.of(model)
    words = (args.target, args.versus)
    targets, versus = (None if given is None else [classes.find(word) for word in given] for given in words)
    names = classes.names
    _check(args.top, targets, versus, names)
    print(f"{args.model}: {len(names)} classes; {len(sources)} file{'s' * (len(sources) > 1)} to explain\n")
    if about := training_data(model):
        print(f"The model was trained on {about}.\n")
    return sources, model, {"names": names, "targets": targets, "versus": versus}


def _load(args: argparse.Namespace) -> Any:
    from ..hub import load_model

    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    model = load_model(args.model).to(choose_device(args.device, args.processes))
    if not hasattr(model, "explain"):
        kind = type(model).__name__
        raise ValueError(f"--model {args.model}: {kind} cannot explain itself: use a timm_coda model")
    return model


def _run_units(args: argparse.Namespace) -> int:
    from ..explanation import save_figure
    from ..gallery import find_strongest, unit_sheet

    model, images, units, label_names = args.processes.in_turn(lambda: _prepare_units(args))
    strongest, skipped = find_strongest(
        model,
        images,
        units,
        label_names=label_names,
        count=args.images,
        batch_size=args.batch_size,
        processes=args.processes,
    )
    if args.processes.rank:
        return 0
    for row in strongest:
        _print_unit(row)
    if skipped:
        _print_skipped([": ".join(one) for one in skipped])
    if not any(row.indices for row in strongest):
        raise ValueError(f"no unit fires in {strongest[0].searched:,} images: nothing to draw; choose other channels")
    save_figure(unit_sheet(strongest), args.output)
    print(f"\n{args.output}: what they see")
    return 1 if skipped else 0


def _prepare_units(args: argparse.Namespace) -> tuple[Any, Any, list[Any], Any]:
    """Return the model, the images to search, the units, and the names of the images' classes."""
    from timm.data import resolve_model_data_config

    from ..data import ImageDataset, create_transforms, load_data
    from ..explanation import Unit, letters

    if args.inputs:
        raise ValueError(f"{args.inputs[0]}: --unit searches a dataset: give it as --data, and no INPUT")
    if not args.data:
        raise ValueError("--unit: which images shall be searched? Name a dataset with --data, such as --data digits")
    if args.versus:
        raise ValueError(f"--versus {args.versus[0]}: a unit is no class; leave out --versus or --unit")
    if args.images < 1:
        raise ValueError(f"--images {args.images}: must be at least 1")
    if args.output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output {args.output}: with --unit, the name of a file that ends in .png, .svg or .pdf")
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"--output {args.output}: exists; name another file, or add --overwrite")
    units = [Unit.parse(text) for text in args.unit]
    letters(12)  # a missing library stops the command before the search
    model = _load(args)
    options = {name: getattr(args, name) for name in ("subset", "test_split", "image_column", "label_column")}
    data = load_data(args.data, **options, training=False)
    if data.test.rows is data.train.rows:  # a single split, of which a part would be held out from training
        data = load_data(args.data, **options | {"test_split": data.train.name}, training=False)
    print(f"{args.model}: searching {len(data.test):,} {data.test.name} images")
    for note in data.notes:
        print(textwrap.fill(note, 79))
    _, transform = create_transforms(resolve_model_data_config(model))
    return model, ImageDataset(data.test, transform), units, data.label_names


def _print_unit(row: "Strongest") -> None:
    from ..explanation import from_no_pixel

    print(f"\n{row.unit}")
    if row.found is None or row.found.position is None:
        print(f"  never fires: its largest activation in {row.searched:,} images is {row.largest:.3g}")
        return
    print("  activation  at row, column  true class      image")
    numbers = zip(row.found.value.tolist(), row.found.position.tolist(), row.classes, row.names, strict=True)
    for value, (line, column), label, name in numbers:
        print(f"  {value:10.4g}  {f'{line}, {column}':14}  {_short(label, 14):14}  {_short(name, 34)}")
    if residuals := list(filter(None, from_no_pixel(row.found))):
        print(f"  Of these, up to {max(residuals, key=float)} comes from the position embedding, from no pixel.")


def _explain(sources: "Sequence[Source]", gallery: "Gallery") -> None:
    """Explain all sources that were not explained before, in order: a batch of images when it is full."""
    from tqdm import tqdm

    from ..gallery import VIDEO_SUFFIXES

    processes, size = gallery.processes, gallery.batch_size
    images = [place for place, source in enumerate(sources) if source.suffix not in VIDEO_SUFFIXES]
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    rounds = [batches[start : start + processes.count] for start in range(0, len(batches), processes.count)]
    videos = [[[place]] for place in sorted(set(range(len(sources))) - set(images))]
    if videos and processes.rank:
        processes.say("videos are not shared: process 0 explains them")
    with tqdm(total=len(sources), desc="explaining", unit="file", disable=None, leave=False) as bar:
        for unit in sorted(rounds + videos, key=lambda unit: unit[-1][-1]):
            files = [[sources[place] for place in batch] for batch in unit]
            if unit not in videos:
                gallery.explain(files)
            elif processes.rank == 0:
                _explain_video(files[0][0], gallery)
            bar.update(sum(map(len, unit)))
    for source in gallery.videos:
        _explain_video(source, gallery)
    gallery.finish()


def _explain_video(source: "Source", gallery: "Gallery") -> None:
    from ..gallery import InputError, VideoError, digest_of, fetched, reason_of

    path = Path(source.place)
    try:
        with fetched(source) as path:
            _add_video(source, path, gallery, digest_of(path))
    except (VideoError, InputError) as error:
        gallery.skip(source, str(error).removeprefix(f"{source.name}: ").removeprefix(f"{path}: "))
    except OSError as error:
        gallery.skip(source, reason_of(error))


def _add_video(source: "Source", path: Path, gallery: "Gallery", digest: str) -> None:
    from tqdm import tqdm

    from ..gallery import VideoError, explain_video

    if gallery.record.find(source, digest):
        gallery.explained, gallery.reused = gallery.explained + 1, gallery.reused + 1
        return
    output = gallery.output / f"{source.stem}.overlay.mp4"
    try:
        found = explain_video(
            gallery.model,
            path,
            output,
            target=gallery.targets[0] if gallery.targets else None,
            versus=gallery.versus[0] if gallery.versus else None,
            label_names=gallery.names,
            batch_size=gallery.batch_size,
        )
    except ImportError as error:
        raise VideoError(str(error)) from error
    gallery.explained += 1
    gallery.record.add(source, digest, [output, output.with_suffix(".csv")])
    seen = f"{found.frames} frames, {100 * found.predicted / found.frames:.0f} % of them {gallery.names[found.target]}"
    tqdm.write(f"{_short(source.name, 26):26} {_short(seen, 52)}" + (f"\n  ({found.note})" if found.note else ""))


def _show(row: "Row") -> None:
    from tqdm import tqdm

    tqdm.write(_line(row.name, row.top, row.note))


def _line(name: str, top: list[tuple[str, float]], note: str) -> str:
    """Format a name and its three most probable classes in 80 columns, and whether none of them is probable."""
    unknown = "nothing recognised: no class reaches 0.50" if top[0][1] < 0.5 else ""
    note = "; ".join(filter(None, [unknown, note]))
    classes = [f"{_short(label, 12):12} {probability:4.2f}" for label, probability in top[:3]]
    return f"{_short(name, 26):26} {' '.join(classes)}".rstrip() + (f"\n  ({note})" if note else "")


def _short(text: str, width: int) -> str:
    """Truncate to the width: paths at the start, other texts at the end."""
    if len(text) <= width:
        return text
    return "…" + text[-width + 1 :] if "/" in text else text[: width - 1] + "…"


def _check(top: int, targets: list[int] | None, versus: list[int] | None, names: "Sequence[str]") -> None:
    if not 1 <= top <= len(names):
        raise ValueError(f"--top {top}: the model has {len(names)} classes")
    if versus is None:
        return
    if len(versus) > 1 and len(versus) != len(targets or ()):
        raise ValueError(f"--versus has {len(versus)} classes: give one, or one for each --target")
    for pair in zip(targets or (), versus * len(targets or ()), strict=False):
        if pair[0] == pair[1]:
            raise ValueError(f"--versus {names[pair[0]]}: the same class as --target: use another")
