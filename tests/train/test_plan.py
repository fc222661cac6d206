import io

from rich.console import Console

from loradeck.base.load import Base
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.example import Example
from loradeck.train.plan import plan
from loradeck.train.progress import progress, table
from loradeck.train.trainer import Step, train


def screen(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=120, force_terminal=terminal), file


def test_a_plan_is_what_train_does(base: Base, bank: Bank, examples: list[Example]) -> None:
    config = TrainConfig(batch_size=3, epochs=2)
    alone = sum(parameter.nbytes for name, parameter in base.model.named_parameters() if "loradeck" not in name)
    bank.add("other", LoraConfig(r=64))
    made = plan(base, bank, "one", [*examples[:3], Example([5, 6, 7], [-100, 6, 7], truncated=True)], config)
    assert made.trainable == sum(parameter.numel() for parameter in bank.parameters("one"))
    assert (made.adapter_bytes, made.base_bytes) == (4 * made.trainable, alone)
    assert (made.examples, made.truncated, made.batch_size) == (4, 1, 3)
    assert made.longest == max(len(example.tokens) for example in examples[:3])
    assert made.tokens == sum(len(example.tokens) for example in examples[:3]) + 3
    assert made.supervised == sum(len(answer) + 1 for answer in ("Ahoy!", "Fair winds", "4")) + 2
    steps = []
    train(base, bank, "one", examples, config, on_step=steps.append)
    assert made.schedule.steps == steps[-1].steps == 4
    assert made.schedule(1) == steps[1].learning_rate


def test_the_first_example_is_shown_with_its_mask(base: Base, bank: Bank, examples: list[Example]) -> None:
    made = plan(base, bank, "one", examples, TrainConfig())
    assert made.first == [("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), ("Ahoy!<|im_end|>", True)]
    console, file = screen()
    console.print(table(made))
    assert "learned  Ahoy!<|im_end|>" in file.getvalue()
    assert "read     <|im_start|>user" in file.getvalue()
    assert "4, the longest of" in file.getvalue()


def test_a_strangers_text_moves_no_cursor(base: Base, bank: Bank, examples: list[Example]) -> None:
    tokens = base.tokenizer("[bold]\x1b[2J" + "a" * 1000)["input_ids"]
    console, file = screen()
    console.print(table(plan(base, bank, "one", [Example(tokens, tokens)], TrainConfig())))
    assert "\x1b" not in file.getvalue()
    assert "[bold]" in file.getvalue()
    assert file.getvalue().count("a" * 80) < 8


def test_a_file_gets_about_ten_lines_and_a_terminal_a_bar() -> None:
    for terminal in (False, True):
        console, file = screen(terminal=terminal)
        with progress(console) as on_step:
            for n in range(1, 101):
                on_step(Step(n, 100, loss=3 / n, learning_rate=1e-3, tokens=200 * n, seconds=2.0 * n))
        text = file.getvalue()
        assert "loss 0.030" in text
        assert "100 tokens/s" in text
        if terminal:
            assert "100/100" in text
        else:
            assert len(text.splitlines()) == 11
            assert text.startswith("step 1/100 · loss 3.000 · 100 tokens/s · 0:03:18 left")
