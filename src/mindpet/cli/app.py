"""The commands. Nothing heavy is imported before a command needs it: ``mindpet --help`` is instant."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(
    help="Tune a few parameters of a large model, on MindSpore.",
    epilog="Begin with: mindpet config init run.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Write, show and check run files.", no_args_is_help=True)
app.add_typer(config_app, name="config")

RunFile = Annotated[Path, typer.Argument(help="The run file; write one with: mindpet config init run.yaml")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...", help="Override keys of the run file: train.epochs=3 method.rank=4"
    ),
]
TunedSource = Annotated[
    str,
    typer.Argument(help="A finished run: its directory or run file. With --delta, a model or package.module:factory."),
]
DeltaOption = Annotated[Optional[Path], typer.Option("--delta", help="A delta directory to use on the source.")]  # noqa: UP045
RunDirectory = Annotated[Path, typer.Argument(help="The output directory of a finished run.")]


def _version(wanted: bool) -> None:
    if wanted:
        from mindpet import __version__

        typer.echo(f"mindpet {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def finetune(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save of an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a directory that holds a run.")] = False,
) -> None:
    """Tune a model as a run file says.

    [bold]Ctrl-C[/bold] saves and stops; [bold]--resume[/bold] goes on from there, with the same result as if nothing
    had happened. The output directory gets run.yaml, metrics.jsonl, curve.png, report.json and the delta.

    Examples:
      mindpet finetune run.yaml

      mindpet finetune run.yaml method.name=adapter train.epochs=3 output.directory=runs/adapter

      mindpet finetune run.yaml parallel.processes=2
    """
    with _readable_errors():
        from mindpet.cli.screen import Screen, print_report
        from mindpet.train.config import load_run

        config = load_run(run_file, overrides)
        from mindpet.parallel.group import join, launched
        from mindpet.train import run

        screen = Screen(quiet=launched() and not join().leads)  # msrun's own processes: the first one speaks
        report = run.finetune(config, screen, resume=resume, overwrite=overwrite)
        print_report(screen.console, report, Path(config.output.directory))


@app.command()
def compare(
    run_file: RunFile,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="Methods, instead of compare.methods; each also as METHOD+r_drop."),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Seeds, instead of compare.seeds."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Look for each method's learning rate first, on training rows only.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD[:SEED]", help="Run these cells alone; may be given several times."),
    ] = None,
    redo: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD[:SEED]", help="Begin these cells anew although they are finished."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; they share the cores.")] = 1,
) -> None:
    r"""Compare methods on your model and data, over several seeds.

    One run of each method for each seed, each in a process and a directory of
    its own. What is finished is kept: after [bold]Ctrl-C[/bold], a crash or a change of
    settings the same command does what is missing, and an interrupted run goes
    on from its last save. The output directory gets comparison.md, .csv, .json
    and .png, written anew after every run: quality, trained share, memory and
    time of each method.

    Each method starts from its own usual learning rate. What you set in the
    file's section train holds for all of them, what stands in its section method
    for that method only, and compare.settings is for one method each:

      compare:
        methods: \[lora, full, lora+r_drop]  # r_drop is full tuning with it
        seeds: \[0, 1, 2]
        settings: {lora: {method.rank: 4}, full: {train.learning_rate: 5e-5}}

    Quality is that of the last step, on held-out rows that are the same for all;
    train.keep_best and train.early_stopping are off, since they would choose on
    those rows.

    Examples:
      mindpet compare run.yaml

      mindpet compare run.yaml --methods lora,bitfit,full --seeds 0,1,2 --search

      mindpet compare run.yaml --only lora:1 --redo lora:1
    """
    with _readable_errors():
        from mindpet.train.config import RunFileError, load_run

        config = load_run(run_file, overrides)
        from mindpet.cli.board import Board, print_comparison
        from mindpet.train.compare import compare as run_comparison
        from mindpet.train.comparison.plan import make_plan

        try:
            numbers = [int(word) for word in seeds.split(",")] if seeds else None
        except ValueError:
            raise RunFileError(f"--seeds takes whole numbers with commas between them, not {seeds!r}.") from None
        plan = make_plan(config, methods.split(",") if methods else None, numbers)
        with Board() as board:
            result = run_comparison(plan, board, search=search, only=only, redo=redo, jobs=jobs)
        print_comparison(board.console, result, plan.directory)
        for cell, words in result["failures"].items():
            typer.secho(f"\n{cell} failed:\n{words}", fg="red", err=True)
        if result["failures"]:
            raise typer.Exit(1)


@app.command()
def evaluate(
    directory: RunDirectory,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Score a tuned model on its held-out rows, or on others: accuracy, or a language model's perplexity.

    Examples:
      mindpet evaluate runs/latest

      mindpet evaluate runs/latest data.test=other.jsonl

      mindpet evaluate runs/shakespeare data.test=sonnets.txt
    """
    with _readable_errors():
        from mindpet.cli.screen import Screen, print_scores
        from mindpet.train import run

        screen = Screen(quiet=as_json)
        _note(run.unfinished(directory))
        scores, labels = run.evaluate(directory, overrides, screen)
        if as_json:
            typer.echo(json.dumps(scores.in_full(labels), ensure_ascii=False))
        else:
            print_scores(screen.console, scores, labels)


@app.command()
def infer(
    directory: RunDirectory,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to classify; without any, lines from stdin.")] = None,
    file: Annotated[Optional[Path], typer.Option("--file", help="A file with one text a line.")] = None,  # noqa: UP045
    model: Annotated[Optional[str], typer.Option(help="Where the model is now, if it was moved.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
) -> None:
    """Classify texts with a tuned model.

    Examples:
      mindpet infer runs/latest "Shares fall as oil price climbs"

      mindpet infer runs/latest --file headlines.txt --json
    """
    with _readable_errors():
        lines = list(texts or [])
        if file is not None:
            if not file.is_file():
                raise ValueError(f"There is no file {file}.")
            with open(file, encoding="utf-8-sig") as opened:
                try:
                    lines += [line.rstrip("\n") for line in opened]
                except UnicodeDecodeError as error:
                    raise ValueError(f"{file} is not UTF-8: {error}") from error
        elif not lines:
            lines = [line.rstrip("\n") for line in sys.stdin]
        lines = [line for line in lines if line.strip()]
        if not lines:
            raise ValueError("There is no text to classify: give some as arguments, with --file, or on stdin.")
        from mindpet.cli.screen import Screen, print_predictions
        from mindpet.train import run

        _note(run.unfinished(directory))
        predictions = run.infer(directory, lines, [f"model.path={model}"] if model else None)
        if as_json:
            for line, chances in zip(lines, predictions):
                typer.echo(
                    json.dumps(
                        {"text": line, "label": next(iter(chances)), "probabilities": chances}, ensure_ascii=False
                    )
                )
        else:
            print_predictions(Screen().console, lines, predictions)


@app.command()
def generate(
    source: Annotated[str, typer.Argument(help="A finished run, a model's directory, or a .gguf file.")],
    prompt: Annotated[str | None, typer.Argument(help="What to continue or to answer; from stdin if left out.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="The prompt is a user's turn, or the beginning of a text.", show_default=False
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system's turn before the user's.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 1 draws as the model does.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that have this probability together.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    delta: DeltaOption = None,
    mode: Annotated[
        str | None, typer.Option(metavar="pynative|graph", help="How MindSpore runs it; see above.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, and nothing before.")
    ] = False,
) -> None:
    """Continue a text, or answer, with a language model. The text appears as it is generated.

    Without [bold]--chat[/bold] or [bold]--raw[/bold], the prompt is a user's turn if the model has a chat
    template, unless the run was on plain text; a line on stderr says which.
    Only the continuation goes to stdout. [bold]Ctrl-C[/bold] ends it with what there is.

    Graph mode compiles for some seconds before the first token, then is three
    to six times as fast as PyNative: it pays from 50 tokens on, or 100. So the
    default is graph from [bold]--max-tokens 128[/bold] on, and pynative below.

    Examples:
      mindpet generate runs/latest "To be, or not"

      mindpet generate models/smollm2.gguf "What is a tide?" --temperature 0.7 --top-p 0.9

      mindpet generate models/smollm2.gguf --raw --stop . < beginning.txt
    """
    with _readable_errors():
        if mode not in (None, "pynative", "graph"):
            raise ValueError(f"--mode is pynative or graph, not {mode!r}.")
        mode = mode or ("graph" if max_tokens >= 128 else "pynative")
        if prompt is None:
            if sys.stdin.isatty():
                _note("Type the prompt; Ctrl-D ends it.")
            prompt = sys.stdin.read().removesuffix("\n")
        from mindpet.cli.stream import ended_at_once, print_stream
        from mindpet.models.sampling import Sampling
        from mindpet.train.run import unfinished
        from mindpet.train.writing import open_writer

        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        Sampling(**sampling)  # a mistake is told before the model is read
        if stop and "" in stop:
            raise ValueError("--stop must not be empty.")
        typer.echo(f"Reading {source}...", err=True)
        writer = open_writer(source, delta, mode)
        if os.path.isfile(os.path.join(source, "run.yaml")):
            _note(unfinished(source))
        form = writer.form if chat is None else "chat" if chat else "raw"
        tokens = writer.tokens_of(prompt, form, system)
        typer.echo(f"{form}: {writer.why if chat is None else 'as asked for'}.", err=True)
        if mode == "graph":
            typer.echo("Compiling takes 5 to 30 seconds; --mode pynative begins at once.", err=True)
        with ended_at_once():
            stream = writer.write(tokens, max_tokens=max_tokens, stop=stop or (), **sampling)
        result = print_stream(stream, as_json, {"source": source, "form": form, "mode": mode, **sampling})
        if result.stopped == "interrupted":
            raise typer.Exit(130)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A run file, a directory of weights, or package.module:factory.")],
    overrides: Overrides = None,
) -> None:
    """Show what a method would adapt, how much would train, and what memory that takes. Nothing is trained.

    Examples:
      mindpet inspect run.yaml

      mindpet inspect models/minilm method.name=adapter

      mindpet inspect mypackage.networks:build method.targets="['*.dense']"
    """
    with _readable_errors():
        from mindpet.cli.screen import Screen, print_inspection
        from mindpet.train.artifacts import inspect as look

        print_inspection(Screen().console, look(source, overrides))


@app.command()
def summary(
    source: Annotated[
        str | None,
        typer.Argument(help="A run file, a directory of weights, or a .gguf or e5 .bin file."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A known network, llama-7b for instance; no files needed.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="One method; may be given several times. All by default.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adam, adamw or sgd (with momentum).")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32 or float16.")] = None,
    labels: Annotated[int, typer.Option(help="Classes of a classifier's head.")] = 2,
) -> None:
    """Count what each method would train, and the memory for weights and optimizer. No weights are read.

    The options of a run file's sections method and compare, and its optimizer, are those counted.

    Examples:
      mindpet summary --preset llama-7b --dtype float16

      mindpet summary models/minilm --method lora --method bitfit --optimizer sgd

      mindpet summary run.yaml
    """
    with _readable_errors():
        from mindpet.cli.arithmetic import print_summary
        from mindpet.train.config import load_run
        from mindpet.train.counters import method_key
        from mindpet.train.summary_table import sizes_of, summary_table

        options: dict[str, dict[str, Any]] = {}
        if source is not None and source.endswith((".yaml", ".yml")):
            config = load_run(Path(source))
            source, optimizer = config.model.path, optimizer or config.train.optimizer
            options = {method_key(config.method.name): dict(config.method.options)}
            for name, settings in config.compare.settings.items():  # those of a comparison go over the method's own
                for key, value in settings.items():
                    if key.startswith("method."):
                        options.setdefault(method_key(name), {})[key.removeprefix("method.")] = value
        title, content = sizes_of(source, preset)
        network = preset if preset is not None else content
        rows = summary_table(network, method or [], options, optimizer=optimizer or "adam", dtype=dtype, labels=labels)
        print_summary(title, rows, optimizer or "adam")


@app.command()
def plan(
    source: Annotated[
        str | None,
        typer.Argument(help="A run file, a directory of weights, or a .gguf or e5 .bin file."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A known network, glm2-6b for instance; no files needed.")] = None,
    method: Annotated[str | None, typer.Option(help="A method, or full; lora by default.")] = None,
    devices: Annotated[
        int | None, typer.Option(help="How many; with one of the next two, the other follows from it.")
    ] = None,
    data_parallel: Annotated[int | None, typer.Option(help="Into how many parts the batch is cut.")] = None,
    model_parallel: Annotated[int | None, typer.Option(help="Into how many parts the weights are cut.")] = None,
    cut: Annotated[
        str | None, typer.Option(metavar="rows|columns", help="All layers alike; by turns when not given.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Samples in a step, all devices together; the run file's, or 8.")
    ] = None,
    seq: Annotated[
        int | None, typer.Option(help="Tokens in each sample; the run file's, or 2048 or as many as there can be.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adam, adamw or sgd (with momentum).")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of weights and activations: float32 or float16.")] = None,
    memory: Annotated[str, typer.Option(help="Of a device.")] = "32GB",
    bandwidth: Annotated[str, typer.Option(help="Between devices, each.")] = "25GB/s",
    speed: Annotated[str, typer.Option(help="Of a device.")] = "200TFLOP/s",
    kernels: Annotated[
        bool, typer.Option("--kernels/--no-kernels", help="Whether mindpet's CPU kernels compute, or MindSpore's own.")
    ] = True,
) -> None:
    """Plan tuning over several devices: memory, communication, largest batch, strategies. No weights are read.

    Examples:
      mindpet plan --preset glm2-6b --devices 8 --model-parallel 4 --batch 8 --seq 2048

      mindpet plan --preset llama3-70b --devices 16 --model-parallel 8 --dtype float16 --memory 64GB

      mindpet plan run.yaml --devices 2
    """
    with _readable_errors():
        from mindpet.cli.arithmetic import print_plan
        from mindpet.train.config import load_run
        from mindpet.train.plan_answer import planned
        from mindpet.train.summary_table import sizes_of

        options = {}
        if source is not None and source.endswith((".yaml", ".yml")):
            config = load_run(Path(source))
            source, optimizer = config.model.path, optimizer or config.train.optimizer
            batch = config.train.batch_size if batch is None else batch
            seq = config.data.max_length if seq is None else seq
            if method in (None, config.method.name):
                method, options = config.method.name, config.method.options
        by_name = source is None and preset is not None  # then what is wrong with it is said with all else
        title, network = (str(preset), preset) if by_name else sizes_of(source, preset)
        found = planned(
            network or "",
            method or "lora",
            options,
            amounts={"memory": memory, "bandwidth": bandwidth, "speed": speed},
            devices=devices,
            data_parallel=data_parallel,
            model_parallel=model_parallel,
            cut=cut,
            batch=8 if batch is None else batch,
            seq=seq,
            optimizer=optimizer or "adam",
            dtype=dtype,
            kernels=kernels,
        )
        print_plan(title, found)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One of them, for its options and their defaults.")] = None,
) -> None:
    """List the methods: what each trains, adapts, takes and reaches, if it merges, if PEFT has it; or tell of one.

    Examples:
      mindpet methods

      mindpet methods lora
    """
    with _readable_errors():
        from mindpet.cli.screen import Screen, print_rows
        from mindpet.train.artifacts import by_whom, measured, method_options, methods_table
        from mindpet.train.counters import method_key

        console = Screen().console
        if name is None:
            rows = [{**row, "paper": by_whom(row["paper"])} for row in methods_table()]
            print_rows(console, rows, spared=("paper", "adapts", "learning rate", "static MiB", "PEFT"))
            full = ", ".join(measured()["full"].values())
            console.print(
                "The share is of BERT-base's parameters. Measured on MiniLM: memory of weights and optimizer, time of "
                f"a step over LoRA's, accuracy on Reuters R8 of three seeds; full fine-tuning: {full}.\n"
                "The options of one: mindpet methods NAME"
            )
            return
        if name.lower() == "full":
            console.print(
                "full: every parameter trains; no options. "
                + "; ".join(": ".join(one) for one in measured()["full"].items())
            )
            return
        options = method_options(name)  # an unknown name is said at once
        for key, value in next(row for row in methods_table() if row["method"] == method_key(name)).items():
            console.print(f"[bold]{key}[/bold]: {value}")
        print_rows(console, [{"option": key, "default": d, "meaning": m} for key, (d, m) in options.items()])


@app.command()
def merge(
    source: TunedSource,
    target: Annotated[Path, typer.Argument(help="Directory for the merged model.")],
    delta: DeltaOption = None,
) -> None:
    """Write a model with a delta folded into its weights.

    Examples:
      mindpet merge runs/latest models/headlines

      mindpet merge models/minilm models/theirs --delta deltas/theirs
    """
    with _readable_errors():
        from mindpet.train.artifacts import merge_into

        tuned = merge_into(source, target, delta)
        _note(_POOLING if tuned.pooling == "mean" else "")
        names = ", ".join(sorted(path.name for path in target.iterdir()))
        typer.echo(f"Wrote {target}: {names}.")


@app.command()
def export(
    source: TunedSource,
    target: Annotated[Path, typer.Argument(help="Directory for the adapter.")],
    delta: DeltaOption = None,
) -> None:
    """Write a delta as an adapter for Hugging Face PEFT.

    Examples:
      mindpet export runs/latest adapters/headlines

      mindpet export models/minilm adapters/ours --delta deltas/ours
    """
    with _readable_errors():
        from mindpet.train.artifacts import export_to

        tuned = export_to(source, target, delta)
        _note(_POOLING if tuned.pooling == "mean" else "")
        typer.echo(f"Wrote {target}. In PyTorch: PeftModel.from_pretrained(model, {str(target)!r})")


@app.command("import")
def import_(
    adapter: Annotated[Path, typer.Argument(help="Directory of a Hugging Face PEFT adapter.")],
    target: Annotated[Path, typer.Argument(help="Directory for the delta.")],
    model: Annotated[str, typer.Option(help="Directory of the base model, or package.module:factory.")],
    labels: Annotated[Optional[int], typer.Option(help="Classes of the head; the adapter's own by default.")] = None,  # noqa: UP045
) -> None:
    """Read an adapter of Hugging Face PEFT and write it as a delta for mindpet.load_delta.

    Examples:
      mindpet import adapters/theirs deltas/theirs --model models/minilm
    """
    with _readable_errors():
        from mindpet.train.artifacts import import_adapter

        found = import_adapter(adapter, model, target, labels)
        typer.echo(f"Wrote {target}: {found.method} on {len(found.adapted)} cells, {found.trainable:,} parameters.")


@config_app.command("init")
def config_init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("run.yaml"),
    model: Annotated[str, typer.Option(help="Directory of the model.")] = "path/to/model",
    train: Annotated[str, typer.Option(help="Training data.")] = "path/to/train.jsonl",
) -> None:
    """Write a run file with every key, its default, and what it means.

    Examples:
      mindpet config init run.yaml --model models/minilm --train headlines.jsonl
    """
    with _readable_errors():
        from mindpet import _files
        from mindpet.train.config import template

        if path.exists():
            raise ValueError(f"{path} is there already; choose another name.")
        _files.write_text(path, template(model, train))
        typer.echo(f"Wrote {path}. Fill in model.path and data.train, then: mindpet finetune {path}")


@config_app.command("show")
def config_show(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print the run file with all defaults and overrides in it.

    Examples:
      mindpet config show run.yaml train.epochs=3
    """
    with _readable_errors():
        from mindpet.train.config import as_yaml, load_run

        typer.echo(as_yaml(load_run(run_file, overrides)), nl=False)


@config_app.command("validate")
def config_validate(run_file: RunFile, overrides: Overrides = None) -> None:
    """Check a run file, its method, its model and its data without training.

    Examples:
      mindpet config validate run.yaml
    """
    with _readable_errors():
        from mindpet.train.config import load_run

        config = load_run(run_file, overrides)
        from mindpet.cli.screen import Screen
        from mindpet.train import run

        screen = Screen()
        prepared = run.prepare(config, screen)
        run.build_network(config, prepared.labels)
        screen.console.print(f"{run_file} is fine.", style="green", markup=False)


_POOLING = (
    "Note: this head was trained on the mean of the tokens (model.pooling=mean). BertForSequenceClassification of "
    "transformers feeds the pooler's output to it and gives other answers: mean-pool there, or tune with "
    "model.pooling=pooler."
)


def _note(text: str) -> None:
    if text:
        typer.secho(text, fg="yellow", err=True)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """A wrong word, key or value becomes a message and exit status 2, what goes wrong on the way 1, Ctrl-C 130."""
    # MindSpore's log writes warnings about itself over the progress bar; GLOG_v brings them back
    os.environ.setdefault("GLOG_v", "3")
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        typer.secho("Interrupted.", fg="yellow", err=True)
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        if os.environ.get("MINDPET_TRACEBACK"):
            raise
        ours = type(error).__module__.startswith("mindpet") or type(error) is ValueError
        code = getattr(error, "exit_code", 2 if ours and isinstance(error, ValueError) else 1)
        if code == 130:
            typer.secho(f"{error}", fg="yellow", err=True)
            raise typer.Exit(code) from None
        if isinstance(error, ModuleNotFoundError):
            typer.secho(f"{error.name} is missing: pip install 'mindpet[cli,text]'", fg="red", err=True)
            raise typer.Exit(1) from None
        said = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            said = f"{error.filename}: {error.strerror}."
        elif not ours:
            said += f"\n({type(error).__name__}; MINDPET_TRACEBACK=1 shows where)"
        typer.secho(said, fg="red", err=True)
        raise typer.Exit(code) from None
