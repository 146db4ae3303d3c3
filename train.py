"""Train an image classifier that explains itself.

  python train.py                                 # digits (1 min, CPU, offline)
  python train.py --data uoft-cs/cifar10          # as in the paper, on a GPU
  python train.py --data path/to/images --model coda_net_xs --img-size 64
  python train.py --config recipe.yaml --lr 1e-3  # a recipe with one change
  python train.py --resume runs/my-run            # continue a stopped run
  accelerate launch --multi_gpu --num_processes 2 train.py  # GPUs or CPU

Images are sorted into class folders, such as path/to/images/train/cat/1.png.
A resumed run gives the same weights as one that was never interrupted; on a GPU,
up to the order of sums.

The output folder holds the model of the best epoch, which timm loads after
`import timm_coda`: timm.create_model("local-dir:FOLDER", pretrained=True).
It also holds explanation.png, summary.json, recipe.yaml (for --config) and
checkpoints/ (for --resume).
"""

# pyright: reportPrivateImportUsage=false
import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: longer spinning is 10x slower on busy CPUs

import timm
import torch
from accelerate.utils import set_seed
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

import timm_coda  # noqa: F401  # registers the models
from timm_coda import benchmark, data, hub
from timm_coda.errors import wrap_errors
from timm_coda.evaluate import TrainingLocalisation
from timm_coda.training import losses, map_penalty, runs, states, trackers
from timm_coda.training.optimizers import create_optimizer
from timm_coda.training.options import HelpFormatter, natural, parse_options, positive, run_options
from timm_coda.training.updates import RecordedUpdates, Updates, can_record

DEFAULT_RECIPE = Path(__file__).parent / "hub_configs/coda_net_xs.digits/recipe.yaml"


def make_parser() -> argparse.ArgumentParser:
    """Define the options. Defaults are the paper's for CIFAR-10 (CVPR 2021), unless the help gives another reason."""
    look = {"usage": "python train.py [options]", "description": __doc__, "formatter_class": HelpFormatter}
    parser = argparse.ArgumentParser("train.py", allow_abbrev=False, **look)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("run").add_argument
    add("--config", help="YAML recipe; command-line options override it (default without --data, --model: digits)")
    add("--output", help="output folder (default: a new one, runs/NAME, runs/NAME-2, ...)")
    add("--overwrite", action=switch, default=False, help="replace the run in the output folder")
    add("--resume", nargs="?", const="auto", help="run folder to resume; auto (no value): --output, if it has a run")
    add("--seed", type=natural, default=0, help="random seed; on a CPU, the same seed gives the same weights")
    add(
        "--mixed-precision",
        choices=["no", "bf16", "fp16"],
        help="precision; a CPU without bf16 instructions takes no (default: accelerate launch's, else no)",
    )
    add("--cuda-graph", action=switch, default=True, help="on one GPU, replay updates without waiting for Python")
    add("--save-every", type=natural, default=0, help="updates between checkpoints in an epoch; 0: only after an epoch")
    add("--keep", type=natural, default=0, help="number of best epochs whose models are also saved, in best/")
    add("--log-every", type=positive, default=10, help="updates between points of the loss curve")
    add("--explain-every", type=natural, default=5, help="epochs between figures of explanations; 0: only at the end")
    add("--explain-images", type=positive, default=8, help="test images in a figure; 8 fit on a page")
    add("--eval-explanations", type=natural, default=0, help="epochs between grid localisation scores; 0: none")
    add("--push-to-hub", metavar="REPO", help="upload the finished run with a model card to the repository USER/NAME")
    add("--report-to", default="none", help="Accelerate tracker: tensorboard, wandb, ...; none: only files")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["digits"], help="digits, Hub id, parquet files, folder of parquet or image files")
    add("--subset", help="configuration of a Hub dataset that has several")
    add("--train-split", help="training split (default: train)")
    add("--test-split", help="test split (default: validation, else test: Hub test splits often lack labels)")
    add("--val-fraction", type=float, default=0.1, help="fraction of training images held out if no test split exists")
    add("--image-column", help="column of images (default: the only one, else image or img)")
    add("--label-column", help="column of labels (default: the class column, else label, class, category or target)")
    add("--hold-out", type=natural, default=0, help="training images that choose the best epoch; 0: test images do")
    add("--num-classes", type=positive, help="number of classes (default: the dataset's)")
    add("--workers", type=natural, default=2, help="processes that decode images; 0 is best for tiny images")
    buffer = {"type": positive, "nargs": "?", "const": 8192, "metavar": "IMAGES"}
    add("--streaming", **buffer, help="stream parquet files, shuffled in a buffer of this size (no value: 8192)")
    add("--data-on-device", action=switch, default=False, help="decode small images once; shift, flip them on device")
    add = parser.add_argument_group("images").add_argument
    add("--img-size", type=positive, help="height and width in pixels (default: the model's)")
    add("--interpolation", help="nearest, bilinear or bicubic (default: the model's)")
    add("--crop-pct", type=float, help="fraction of a test image's width to keep (default: the model's)")
    add("--crop-padding", type=natural, default=4, help="largest random shift of training images in pixels; paper: 4")
    add("--scale", type=float, nargs=2, default=[1.0, 1.0], help="areas of random crops (default: 1 1, whole image)")
    add("--ratio", type=float, nargs=2, default=[1.0, 1.0], help="aspect ratios of random crops (default: 1 1, square)")
    add("--hflip", type=float, default=0.5, help="probability of a left-right flip; 0 for letters and digits")
    add("--color-jitter", type=float, default=0.0, help="strength of colour changes; the paper uses none")
    add("--auto-augment", help="timm's policy, e.g. rand-m10-n2 as in the paper for ImageNet (default: none)")
    add("--erase", type=float, default=0.0, help="probability of a black rectangle; the paper uses none")
    add("--mixup", type=float, default=0.0, help="Mixup alpha; 0: off, as mixed images have no single class to explain")
    add("--cutmix", type=float, default=0.0, help="CutMix alpha; 0: off, for the same reason")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="coda_net_s", help="name of a timm model, local-dir:FOLDER or hf-hub:ID")
    add("--model-args", nargs="+", action="extend", default=[], metavar="NAME=JSON", help="model options, e.g. rank=4")
    add("--pretrained", action=switch, default=False, help="start from the model's published weights")
    add("--compile", action=switch, default=False, help="torch.compile: B-cos networks train three times as fast")
    add("--head-only", action=switch, default=False, help="train only the classifier: fast, but rarely sufficient")
    add("--grad-checkpointing", action=switch, default=False, help="recompute activations in backward to save memory")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, which are then tested and saved; 0: off")
    add = parser.add_argument_group("learning").add_argument
    add("--epochs", type=positive, default=200, help="passes over the training images")
    add("--batch-size", type=positive, default=16, help="images per step and process; on a GPU, increase it and --lr")
    add("--grad-accum", type=positive, default=1, help="steps per update: a larger batch with the same memory")
    add("--loss", choices=losses.LOSSES, default="bce", help="bce: binary cross entropy; -uniform: B-cos v2's targets")
    add("--map-penalty", type=float, default=0.0, help="weight of mean |W(x)| in the loss; CoDA-Nets only")
    add("--smoothing", type=float, default=0.0, help="label smoothing; 0 lets evidence grow without bound")
    add("--opt", default="adam", help="timm optimiser")
    add("--lr", type=float, default=2.5e-4, help="highest learning rate; the default is for batches of 16")
    add("--weight-decay", type=float, default=0.0, help="weight decay; dynamic weights are bounded without it")
    add("--sched", choices=losses.SCHEDULES, default="step", help="timm schedule, stepped at every update")
    add("--decay-epochs", type=float, default=30, help="epochs between two decays (step only)")
    add("--decay-rate", type=float, default=2 / 3, help="factor of a decay (step only) (default: 2/3)")
    add("--warmup-epochs", type=float, default=0.0, help="epochs of linear warm-up; small batches need none")
    add("--min-lr", type=float, default=0.0, help="final learning rate (not for step)")
    add("--clip-grad", type=float, default=0.0, help="maximum norm of the gradient; 0: no limit")
    add("--agc", type=float, default=0.0, help="adaptive clipping: gradient of a unit relative to its weights; 0: none")
    return parser


def train(args: argparse.Namespace, accelerator: Any, stop: list[int]) -> None:
    """Run the whole training, or until `stop` contains a signal: then save, and raise `runs.Stopped`."""
    output, options = Path(args.output), run_options(args)
    environment = hub.environment()  # now, because the code may change during training
    if args.resume and (output / "summary.json").exists():
        raise runs.Stopped(f"{output} is finished: there is nothing to resume", code=0)
    repo_id = args.push_to_hub and hub.check_access(args.push_to_hub)  # fail now, not after hours of training

    def chosen(names: str) -> dict[str, Any]:
        return {name: options[name] for name in names.split()}

    main, processes, device = accelerator.is_main_process, accelerator.num_processes, accelerator.device
    set_seed(args.seed)

    # Data and model
    names = "subset image_column label_column train_split test_split val_fraction num_classes"
    source = (data.load_stream if args.streaming else data.load_data)(args.data, **chosen(names))
    classes, final = source.label_names, None
    if args.hold_out:
        final, source = source.test, source.held_out(args.hold_out)
    named = {"num_classes": len(classes), "label_names": classes}
    notes = list(source.notes)
    named |= {"say": notes.append}
    network: Any = hub.create_model(args.model, **named, **chosen("pretrained model_args head_only"))
    with wrap_errors("--grad-checkpointing", states.RunError):
        network.set_grad_checkpointing(args.grad_checkpointing)
    with wrap_errors("--img-size, --interpolation, --crop-pct or an augmentation", states.RunError):
        config = hub.resolve_input_data_config(network, chosen("img_size interpolation crop_pct"))
        changes = chosen("crop_padding scale ratio hflip color_jitter auto_augment erase")
        transform, test_transform = data.create_transforms(config, **changes)
    how = chosen("batch_size seed workers streaming data_on_device") | {"config": config, "changes": changes}
    place = {"process": accelerator.process_index, "processes": processes, "device": device}
    loader = data.make_train_loader(source.train, transform, **how, **place)
    test_set = data.ImageDataset(source.test, test_transform)
    test_loader = data.create_loader(test_set, **chosen("batch_size workers"))
    examples = test_set.examples(args.explain_images)
    data.check_images(network, examples.images)
    shared = hub.join_launch()
    localisation = TrainingLocalisation(test_set, len(classes), every=args.eval_explanations, processes=shared)

    # Learning
    batches, images_seen = len(loader), len(source.train)
    if batches == 0:
        raise states.RunError(f"--batch-size {args.batch_size} x {processes} processes exceeds {images_seen} images")
    with wrap_errors("--opt, --lr, --sched or a related option", states.RunError):
        optimizer = create_optimizer(network, device, **chosen("opt lr weight_decay"))
        schedule = chosen("sched decay_epochs decay_rate warmup_epochs min_lr")
        schedule |= {"num_epochs": args.epochs, "updates_per_epoch": math.ceil(batches / args.grad_accum)}
        scheduler: Any = create_scheduler_v2(optimizer, step_on_epochs=False, **schedule)[0]
    mixing = losses.Mixing(args.mixup, args.cutmix, args.smoothing, len(classes))
    smoothing = 0.0 if mixing.on else args.smoothing  # Mixing smooths the labels
    loss_function, test_loss = losses.make_loss(args.loss, smoothing), losses.make_loss(args.loss, 0.0)
    ema = ModelEmaV3(network.to(device), args.ema, use_warmup=True) if args.ema else None
    with wrap_errors("--map-penalty", states.RunError):
        penalty = map_penalty.MapPenalty(network, args.map_penalty, mixed=mixing.on)
    trained = runs.compiled(network, device) if args.compile else network
    model, optimizer, test_loader = accelerator.prepare(trained, optimizer, test_loader)
    if args.data_on_device:
        test_loader = list(test_loader)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    published: Any = network if ema is None else ema.module

    # Start or resume
    trackers.start(accelerator, args.report_to, options)
    progress, known = states.Progress(dataset=data.describe_data(source)), (output / "checkpoints", options)
    if args.resume:
        progress = states.load_state(accelerator, *known, progress.dataset)
    if progress.update:
        accelerator.print(f"resuming {output} after update {progress.update}")
    elif main:
        runs.start_folder(output, options)
    silent, parameters = runs.no_pictures(network), sum(weight.numel() for weight in network.parameters())
    where = f"on {processes} x {device.type}; results go to {output}"
    accelerator.print(f"{args.model}, {parameters:,} parameters, {where}")
    about = f"{images_seen} training and {len(test_set)} {source.test.name} images of {len(classes)} classes"
    accelerator.print(about, *(f"note: {note}" for note in (*notes, silent) if note), sep="\n")
    window = torch.tensor(progress.window[accelerator.process_index] if progress.window else [0.0] * 3, device=device)
    before = time.perf_counter() - progress.seconds

    def compute_gradients(images: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, weight: float) -> None:
        logits = model(images)
        loss = (loss_function(logits, targets) + penalty(labels)) * weight
        accelerator.backward(loss)
        window.add_(torch.where(loss.isfinite(), weight * losses.tally(loss, logits, labels), 0))

    recorded = args.cuda_graph and can_record(accelerator) and not args.grad_checkpointing
    updates = (RecordedUpdates if recorded else Updates)(
        accelerator, model, optimizer, compute_gradients, norm=args.clip_grad, adaptive=args.agc
    )

    def explain(path: Path) -> None:
        """Save contribution maps of the examples for their two most likely classes."""
        if main and not silent:
            explanation = published.eval().explain(examples.images.to(device), top=min(2, len(classes)))
            about = {"weights": hub.weights_fingerprint(published), "true_labels": examples.labels}
            if runs.save_picture(explanation, path, label_names=classes, **about):
                trackers.log_picture(accelerator, path, step=progress.update)

    def save_model(folder: Path) -> None:
        hub.save_model(published, folder, label_names=classes, data_config=config)

    def add_point() -> dict[str, float]:
        means = progress.add_point(*accelerator.reduce(window.clone()).tolist())
        window.zero_()
        trackers.log(accelerator, {**means, "lr": optimizer.param_groups[0]["lr"]}, step=progress.update)
        return means

    def stopping() -> bool:  # the same answer in all processes
        return bool(stop if processes == 1 else accelerator.reduce(torch.tensor(len(stop), device=device)).item())

    def save() -> None:
        progress.window, progress.seconds = accelerator.gather(window[None]).tolist(), time.perf_counter() - before
        progress.check(losses.evaluate(accelerator, network, [examples], test_loss)[0])  # never save diverged weights
        states.save_state(accelerator, *known, progress)
        if stopping():
            trackers.finish(accelerator)
            raise runs.stopped(output, stop)

    while progress.epoch < args.epochs:
        model.train()
        todo, name = loader.from_batch(progress.epoch, progress.batch), f"epoch {progress.epoch + 1}/{args.epochs}"
        bar = runs.progress_bar(todo, name, total=batches, initial=progress.batch, shown=main)
        clock, seen = time.perf_counter(), 0
        for images, labels, skipped in bar:
            progress.batch += 1
            number = (progress.batch - 1) * processes + accelerator.process_index  # over all processes' batches
            set_seed(data.derive_seed(args.seed, progress.epoch, number))
            progress.skip(skipped)
            weight = float(len(labels) > 0)
            if not weight:  # no image is readable: take part with weight 0, as other processes wait
                images, labels = examples.images.to(device), examples.labels.to(device)
            images, labels, targets = mixing(images, labels)
            with accelerator.accumulate(model):
                made = updates.step(images, labels, targets, weight)
            seen += len(labels) * processes
            if not accelerator.sync_gradients:
                continue
            progress.add_update(made)
            scheduler.step_update(progress.update)
            if ema is not None and made:
                ema.update(network, step=progress.update)
            if progress.update % args.log_every == 0:
                means, speed = add_point(), seen / (time.perf_counter() - clock)
                bar.set_postfix_str("loss {:.3f} acc {:.3f} {:.0f} img/s".format(*means.values(), speed), refresh=False)
            due = args.save_every > 0 and progress.update % args.save_every == 0
            if progress.batch < batches and (due or stopping()):
                save()

        means, speed = add_point(), seen / (time.perf_counter() - clock)
        losses.share_buffers(published)
        loss, accuracy, unread = losses.evaluate(accelerator, published, test_loader, test_loss)
        progress.skip(unread)
        found = localisation.after_epoch(published, progress.epoch + 1)
        trackers.log(accelerator, {"test_loss": loss, "test_accuracy": accuracy, **found}, step=progress.update)
        numbers = {"loss": loss, "accuracy": accuracy, **found, **means, "images_per_second": speed}
        if progress.add_epoch(numbers) and main:
            save_model(output)
        if main:
            states.keep_best(output / "best", progress.history, args.keep, save_model)
        shown = f"loss {means['train_loss']:.4f}, test loss {loss:.4f}, accuracy {accuracy:.4f}, {speed:.0f} img/s"
        shown += "".join(f", {name} {score:.3f}" for name, score in found.items() if score is not None)
        accelerator.print(f"epoch {progress.epoch:3}/{args.epochs}: {shown}")
        if args.explain_every and progress.epoch % args.explain_every == 0:
            explain(output / "explanations" / f"epoch-{progress.epoch:04}.png")
        save()

    published = timm.create_model(f"local-dir:{output}", pretrained=True).to(device)  # as users load it
    final_set = test_set if final is None else data.ImageDataset(final, test_transform)
    found = localisation.at_end(published, final_set)
    if final is not None:
        batches = accelerator.prepare(data.create_loader(final_set, **chosen("batch_size workers")))
        loss, accuracy, unread = losses.evaluate(accelerator, published, batches, test_loss)
        progress.skip(unread)
        found |= runs.tested(progress, loss, accuracy, held_out=len(test_set))
    if main:
        explain(output / "explanation.png")
        facts = {"options": options, "parameters": parameters, "processes": processes, "label_names": classes}
        facts |= {"weights": hub.weights_fingerprint(published), "notes": notes, "files": source.account}
        facts |= {"device": device.type, "mixed_precision": accelerator.mixed_precision}  # as used
        facts |= {"environment": environment, **found}
        runs.save_summary(output, progress, facts | {"training_images": images_seen, "test_images": len(final_set)})
        print(runs.closing_words(output, progress, found, pictures=not silent))
    trackers.finish(accelerator)
    runs.publish(output, repo_id if main else None)
    if main and device.type == "cuda":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        speed, size = progress.history[-1]["images_per_second"] / processes, config["input_size"]
        share = benchmark.share_of_products(network, size, speed, dtype=dtype, device="cuda")
        print(f"{speed:.0f} images/s on a GPU, {share:.0%} of its rate of matrix products")


def main() -> int:
    try:
        args, stop = parse_options(make_parser(), sys.argv[1:], DEFAULT_RECIPE), runs.watch_signals()
        with runs.started(args) as accelerator:
            train(args, accelerator, stop)
        return 0
    except (states.RunError, data.DataError, hub.HubError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, (hub.SaveError, states.Diverged)) else 2
    except (runs.Stopped, KeyboardInterrupt) as stopped:
        if os.environ.get("RANK", "0") == "0":  # only the main process prints
            print(stopped)
        return getattr(stopped, "code", 130)


if __name__ == "__main__":
    sys.exit(main())
