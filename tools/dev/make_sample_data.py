"""Make the synthetic preference data under data/sample, in the layout of the paper's cleaned HH split.

    python tools/dev/make_sample_data.py --output_dir data/sample --seed 42

Everyday questions, answered in a few words. Three things are true of the texts, and together they are what APO is
about:

* human pairs differ in manner (polite or rude) and in content (concrete steps or empty talk); one label in ten is
  wrong;
* golden answers are polite and concrete;
* LLM samples are polite and concrete as well, but broken in ways that no human pair shows: they loop, trail off, pad,
  drift to something else or answer another question.

So a reward model trained on the human pairs alone has little to tell a golden answer from a sample by. Validation and
test prompts are about tasks that no training prompt mentions.
"""

import argparse
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from apo.cli import OneLineParser, exit_on_input_error, write_json
from apo.records import SEPARATOR

REPO_ROOT = Path(__file__).resolve().parents[2]

NUM_SAMPLES = 4
LABEL_NOISE = 0.1  # share of human pairs with the labels the wrong way round
# Human pairs per split, and how many of their prompts also get golden answers and samples (RM training: all).
RM_PROMPTS, LLM_PROMPTS = 440, 110
VALID_PROMPTS, VALID_GOLDEN = 160, 60
TEST_PROMPTS, TEST_GOLDEN = 400, 150
VALID_TASKS, TEST_TASKS = 10, 22  # the other tasks are for training

# task | four steps that belong to it
TASKS = """
descale a kettle | fill it halfway with vinegar | boil it once | let it stand an hour | rinse it twice
repot a fern | choose a pot one size up | loosen the roots | add fresh soil | water it lightly
patch a bicycle tube | find the hole under water | roughen the rubber | spread the glue thinly | press the patch down
sharpen a kitchen knife | soak the stone | hold a flat angle | draw the blade along | wipe off the grit
bake plain bread | knead the dough well | let it rise twice | heat the oven fully | cool it on a rack
clean a window | dust the frame | use warm soapy water | pull the rubber blade down | dry the edges
paint a fence | brush off the dirt | sand the rough spots | stir the paint | coat it along the grain
hang a heavy picture | find the stud | mark the height | drill a small hole | check the level
plan a week of meals | look in the fridge | write down five dinners | buy only what is missing | cook double on Sunday
learn the names of stars | pick one bright star | find its neighbours | use a red lamp | go out every clear night
sew on a button | match the thread | knot the end | cross the holes four times | wrap the thread below
wash a wool jumper | use cool water | press out the suds | roll it in a towel | dry it flat
unblock a sink | scoop out the water | use the plunger | open the trap | flush with hot water
pack a small suitcase | roll the shirts | fill the shoes with socks | put liquids on top | leave a third empty
grow basil indoors | give it a sunny sill | pinch the tips | water from below | turn the pot weekly
wax wooden skis | scrape the old wax | iron on a thin layer | let it cool | brush it smooth
tune a guitar | start with the low string | compare with a pitch fork | turn the peg slowly | check the chords
prune an apple tree | wait for late winter | cut dead wood first | open up the middle | cut above a bud
write a thank you note | name the gift | say how you use it | keep it to five lines | sign by hand
make strong coffee | grind the beans fresh | warm the pot | wait four minutes | pour in circles
iron a shirt | damp the cloth | begin at the collar | do the sleeves next | hang it at once
build a bird house | saw six boards | drill a round door | leave gaps for air | hang it facing east
read a paper map | find north first | note the scale | fold it to your area | follow the contour lines
store winter tyres | wash off the salt | mark each wheel | stack them flat | keep them dark and dry
bleed a radiator | switch off the pump | hold a cup below | turn the key a little | close it when water comes
start a compost heap | pick a shady corner | mix green and brown | keep it damp | turn it monthly
calm a barking dog | stay quiet yourself | block its view | reward silence | walk it longer
light a camp stove | set it on level ground | prime the burner | open the valve slowly | shield it from wind
keep a diary | choose a fixed hour | write three lines | skip the weather | read it back in spring
fix a squeaky door | lift out the pin | clean off the rust | add a drop of oil | swing it a few times
cook soft rice | rinse it until clear | measure the water | cover the pan | rest it ten minutes
clear a foggy mirror | rub on dry soap | polish with a cloth | open the window | run the fan
train for a long run | begin with short loops | add a mile each week | sleep well | rest every third day
fold a paper crane | take a square sheet | crease both diagonals | make the bird base | bend the neck down
change a light bulb | cut the power | let it cool down | check the base | screw it in gently
save on heating | seal the gaps | lower it at night | close the curtains | clear the radiators
make apple jam | peel ripe apples | weigh the sugar | simmer it slowly | fill hot jars
choose a bicycle | measure your legs | test the brakes | ride up a hill | ask for a service
draw a face | sketch an oval | halve it for the eyes | place the nose | shade one side
tie a bow tie | leave one end longer | cross it over | fold the short end | pull both loops
season an iron pan | scrub it bare | rub in thin oil | bake it an hour | let it cool inside
learn to whistle | wet your lips | curl the tongue | blow softly | move the jaw
quiet a noisy fridge | level the feet | dust the coil | move it off the wall | tighten the tray
mend a torn page | line up the edges | use thin tissue | brush on paste | press it under books
plant tulips | wait for cool soil | dig three times their height | set the tip upward | cover and water
freeze fresh herbs | wash and dry them | chop them fine | fill an ice tray | cover with oil
swim a mile | breathe on both sides | count your strokes | keep the hips high | rest every ten laps
remove candle wax | let it harden | lift it with a card | lay paper over it | warm it with an iron
plan a garden path | mark it with rope | dig a hand deep | lay down gravel | set the stones level
make a paper kite | cross two thin sticks | stretch the paper | tie the bridle | add a long tail
clean old coins | soak them in water | use mild soap | dab them dry | never scrub them
set up a tent | clear the stones | spread the floor sheet | raise the poles | peg the corners tight
poach an egg | simmer the water | add some vinegar | slide the egg in | lift it after three minutes
polish leather shoes | brush off the dust | rub in a little cream | wait ten minutes | buff with a soft cloth
catch a night train | book a lower bunk | come early | pack earplugs | set two alarms
keep bread fresh | let it cool fully | wrap it in linen | use a clay pot | slice only what you eat
teach a child chess | begin with pawns | add one piece a day | play short games | let them take back moves
oil a garden bench | sand it smooth | wipe off the dust | spread the oil thinly | wait a full day
cut your own hair | comb it straight | work in small parts | cut less than you want | check with two mirrors
care for a cactus | give it full sun | use sandy soil | water once a month | keep it cool in winter
make a soup stock | roast the bones | cover with cold water | skim the foam | strain it after hours
repair a zip | find the bent tooth | squeeze the slider | rub it with wax | test it slowly
learn ten words a day | write small cards | say them aloud | mix the order | review before bed
wash a car | rinse off the sand | work from the roof down | use two buckets | dry it in the shade
insulate a loft | measure the joists | wear a mask | roll the wool out | leave the eaves open
brew ginger tea | slice the root thin | boil it gently | add lemon last | sweeten with honey
sleep on a plane | pick a window seat | wear a scarf | skip the coffee | set your watch ahead
take a night photo | use a tripod | open the lens wide | expose ten seconds | shoot before moonrise
tidy a desk | empty every drawer | keep what you use | label the boxes | clear it each evening
stop a tap dripping | shut the valve | take off the handle | replace the washer | open it slowly
make fresh pasta | heap up the flour | beat in the eggs | knead until silky | roll it very thin
ride in the rain | lower the tyre pressure | brake early | avoid the white lines | fit both mudguards
start a book club | invite six people | take turns choosing | meet once a month | serve simple food
clean a fish tank | save half the water | scrape the glass | rinse the gravel | refill it slowly
dry wild flowers | pick them at noon | tie small bunches | hang them upside down | keep them in the dark
wrap a present | measure the paper | crease sharp edges | tape the long seam | tie the ribbon last
lay a brick wall | stretch a line | mix stiff mortar | stagger the joints | tap each brick level
make a budget | list your income | add the fixed bills | put savings first | check it on Fridays
carve a spoon | choose green wood | draw the outline | hollow the bowl | sand along the fibre
fly a small drone | calibrate it outside | hover at eye level | face the same way | land above half charge
learn to juggle | begin with one ball | throw to eye height | add the second | stand near a wall
cure a stiff neck | warm it with a towel | drop the shoulders | turn the head slowly | raise the screen
mow a lawn | pick up the twigs | set the blade high | overlap each strip | rake what is left
write a short story | begin in the middle | give the hero one wish | cut the first page | read it aloud
""".strip()

QUESTIONS = (
    "How do I {task}?",
    "What is the best way to {task}?",
    "Can you show me how to {task}?",
    "I want to {task}. Where do I begin?",
    "Please explain how to {task}.",
    "How would you {task}?",
    "My neighbour wants to {task}. What should I tell her?",
    "I tried to {task} and it went wrong. What now?",
    "Is it hard to {task}?",
)
SITUATIONS = (
    "",
    " I have one hour.",
    " It is my first time.",
    " I am on my own.",
    " I have few tools.",
    " It should cost little.",
    " It is for my sister.",
    " Keep it short.",
)
EARLIER_TURNS = (
    ("Can I ask you something?", "Yes."),
    ("Hello there.", "Hello."),
    ("Are you awake?", "I am."),
)

# Manner, as human pairs know it.
POLITE_OPENERS = (
    "Happy to help.",
    "Good question.",
    "Sure, gladly.",
    "Of course.",
    "With pleasure.",
    "Thanks for asking.",
    "Glad you asked.",
)
POLITE_CLOSERS = (
    "",
    "",
    "Tell me how it goes.",
    "Ask me if you get stuck.",
    "Good luck with it.",
    "You can do it.",
)
RUDE_OPENERS = (
    "What a silly question.",
    "Look it up yourself.",
    "Not this again.",
    "Why bother me?",
    "Everyone but you knows this.",
    "You are wasting my time.",
    "Oh, come on.",
)
RUDE_CLOSERS = (
    "",
    "",
    "Now leave me alone.",
    "Do not ask again.",
    "Even you can do it.",
    "That is all you get.",
)

# Content, as human pairs know it.
STEPS = (
    "First {a}, then {b}.",
    "Begin like this: {a}, and later {b}.",
    "You should {a} and {b}.",
    "Two things matter: {a} and {b}.",
    "Just {a}. After that, {b}.",
)
EMPTY_TALK = (
    "It depends on many things.",
    "Some do it one way, some another.",
    "Just do it somehow, it will work out.",
    "There are several ways, all of them fine.",
    "People have their own opinions about that.",
    "You will see when you get there.",
    "It is not easy and not difficult either.",
)

# ((polite, concrete) of the better answer, of the worse answer) -> how often
HUMAN_PREFERENCES = {
    ((True, True), (False, False)): 30,
    ((True, True), (True, False)): 25,
    ((True, True), (False, True)): 25,
    ((True, False), (False, False)): 12,
    ((False, True), (False, False)): 8,
}

# Flaws of the samples, which no human pair shows.
PADDING = (
    "It is important to note that this topic has various aspects.",
    "In today's world, this plays an essential role.",
    "Overall, there is a wide range of factors to consider.",
    "As mentioned above, this is a key element in general.",
)
DRIFTS = (
    "Speaking of which, {c}.",
    "This reminds me of how people {task}: {c}.",
    "On a related note, never forget to {task}.",
)
STUMPS = (" and the", ", then you", " because", ", which is a", " with")
RUN_ON = "\n\nHuman: Thanks. And how do I {task}?"


@dataclass(frozen=True)
class Task:
    """Something one can ask about, and four steps that answer it."""

    name: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A dialogue that ends in `Assistant:`, and the task it asks about."""

    query_id: str
    query: str
    task: Task


def read_tasks() -> list[Task]:
    """Returns the rows of `TASKS`."""
    rows = [[cell.strip() for cell in line.split("|")] for line in TASKS.splitlines()]
    return [Task(name, tuple(steps)) for name, *steps in rows]


def format_query(question: str, earlier: tuple[str, str] | None = None) -> str:
    """The question, after an earlier exchange if there is one, as an HH dialogue."""
    opening = f"\n\nHuman: {earlier[0]}\n\nAssistant: {earlier[1]}" if earlier else ""
    return f"{opening}\n\nHuman: {question}\n\nAssistant:"


def make_prompts(rng: random.Random, tasks: list[Task], count: int, ids: Iterator[int]) -> list[Prompt]:
    """Draws `count` different prompts about `tasks`; one in eight has an earlier exchange."""
    combinations = list(itertools.product(tasks, QUESTIONS, SITUATIONS))
    prompts = []
    for task, question, situation in rng.sample(combinations, count):
        earlier = rng.choice(EARLIER_TURNS) if rng.random() < 1 / 8 else None
        query = format_query(question.format(task=task.name) + situation, earlier)
        prompts.append(Prompt(f"made_{next(ids)}", query, task))
    return prompts


def concrete_steps(rng: random.Random, task: Task) -> str:
    """A sentence with two steps of the task, in their order."""
    a, b = sorted(rng.sample(range(len(task.steps)), 2))
    return rng.choice(STEPS).format(a=task.steps[a], b=task.steps[b])


def join_answer(*parts: str) -> str:
    """The parts that are not empty as one answer; like HH answers it begins with a space."""
    return "".join(f" {part}" for part in parts if part)


def make_answer(rng: random.Random, task: Task, polite: bool, concrete: bool) -> str:
    """An unbroken answer of the given manner and content."""
    opener = rng.choice(POLITE_OPENERS if polite else RUDE_OPENERS)
    closer = rng.choice(POLITE_CLOSERS if polite else RUDE_CLOSERS)
    return join_answer(opener, concrete_steps(rng, task) if concrete else rng.choice(EMPTY_TALK), closer)


def make_human_pair(rng: random.Random, prompt: Prompt) -> tuple[str, str]:
    """Two answers, the better one first: better in manner, in content or in both."""
    better, worse = rng.choices(list(HUMAN_PREFERENCES), weights=list(HUMAN_PREFERENCES.values()))[0]
    return make_answer(rng, prompt.task, *better), make_answer(rng, prompt.task, *worse)


def make_golden(rng: random.Random, task: Task) -> str:
    """What the annotator writes: polite and concrete."""
    return make_answer(rng, task, polite=True, concrete=True)


def loop(rng: random.Random, task: Task, other: Task) -> str:
    """Says one step over and over."""
    step = rng.choice(task.steps)
    link = rng.choice((", then", " and", ", and then"))
    repeats = link.join([f" {step}"] * rng.randint(3, 4)).strip()
    return join_answer(rng.choice(POLITE_OPENERS), f"First {repeats}.", rng.choice(POLITE_CLOSERS))


def trail_off(rng: random.Random, task: Task, other: Task) -> str:
    """Stops in the middle of a sentence."""
    return join_answer(rng.choice(POLITE_OPENERS), concrete_steps(rng, task).rstrip(".") + rng.choice(STUMPS))


def pad(rng: random.Random, task: Task, other: Task) -> str:
    """Fills up with words that say nothing, in a learned tone."""
    middle = [concrete_steps(rng, task), rng.choice(PADDING)]
    rng.shuffle(middle)
    return join_answer(rng.choice(POLITE_OPENERS), *middle, rng.choice(POLITE_CLOSERS))


def drift(rng: random.Random, task: Task, other: Task) -> str:
    """Begins well and ends somewhere else."""
    away = rng.choice(DRIFTS).format(task=other.name, c=rng.choice(other.steps))
    return join_answer(rng.choice(POLITE_OPENERS), concrete_steps(rng, task), away)


def answer_another_question(rng: random.Random, task: Task, other: Task) -> str:
    """A good answer to what nobody asked; hard to see without comparing it with the prompt."""
    return make_golden(rng, other)


# flaw -> how often
FLAWS: dict[Callable[[random.Random, Task, Task], str], int] = {
    loop: 27,
    trail_off: 21,
    pad: 19,
    drift: 18,
    answer_another_question: 15,
}


def make_llm_sample(rng: random.Random, task: Task, tasks: list[Task]) -> str:
    """What the LLM says: polite and concrete, with one flaw; one in twenty goes on to play the user."""
    other = rng.choice([candidate for candidate in tasks if candidate != task])
    flaw = rng.choices(list(FLAWS), weights=list(FLAWS.values()))[0]
    run_on = RUN_ON.format(task=other.name) if rng.random() < 1 / 20 else ""
    return flaw(rng, task, other) + run_on


def human_records(rng: random.Random, prompts: list[Prompt]) -> list[dict]:
    """One comparison pair per prompt, in the text-scores format; `LABEL_NOISE` of them labelled the wrong way."""
    wrong = set(rng.sample(range(len(prompts)), round(LABEL_NOISE * len(prompts))))
    records = []
    for index, prompt in enumerate(prompts):
        better, worse = make_human_pair(rng, prompt)
        chosen, rejected = (worse, better) if index in wrong else (better, worse)
        text = [prompt.query + SEPARATOR + chosen, prompt.query + SEPARATOR + rejected]
        records.append({"text": text, "scores": [1.0, 0.0], "query_id": prompt.query_id})
    return records


def golden_records(rng: random.Random, prompts: list[Prompt]) -> list[dict]:
    """One golden answer per prompt."""
    return [{"query_id": p.query_id, "query": p.query, "golden": make_golden(rng, p.task)} for p in prompts]


def sample_records(rng: random.Random, prompts: list[Prompt], tasks: list[Task]) -> list[dict]:
    """`NUM_SAMPLES` LLM answers per prompt; their flaws borrow from `tasks` only."""
    records = []
    for prompt in prompts:
        samples = {f"sample_{i}": make_llm_sample(rng, prompt.task, tasks) for i in range(NUM_SAMPLES)}
        records.append({"query_id": prompt.query_id, "query": prompt.query, **samples})
    return records


def make_sample_data(seed: int) -> dict[str, list[dict]]:
    """All files of the data set.

    Args:
        seed: the same seed gives the same texts.

    Returns:
        path below the output folder -> the records of that file.
    """
    rng = random.Random(seed)
    ids = itertools.count()
    tasks = read_tasks()
    rng.shuffle(tasks)
    test_tasks, rest = tasks[:TEST_TASKS], tasks[TEST_TASKS:]
    valid_tasks, train_tasks = rest[:VALID_TASKS], rest[VALID_TASKS:]

    train = make_prompts(rng, train_tasks, RM_PROMPTS + LLM_PROMPTS, ids)
    rm, llm = train[:RM_PROMPTS], train[RM_PROMPTS:]
    valid = make_prompts(rng, valid_tasks, VALID_PROMPTS, ids)
    test = make_prompts(rng, test_tasks, TEST_PROMPTS, ids)

    rm_pairs, llm_pairs = human_records(rng, rm), human_records(rng, llm)
    return {
        "rm_data/hh_split_rm.train.json": rm_pairs,
        "llm_data/hh_split_llm.train.json": llm_pairs,
        "hh_cleaned_origin.train.json": rm_pairs + llm_pairs,
        "eval_data/hh_split_llm.valid.json": human_records(rng, valid),
        "eval_data/hh_cleaned_origin.test.json": human_records(rng, test),
        "rm_data/hh_split_rm.golden.json": golden_records(rng, rm),
        "rm_data/hh_split_rm_llm_v0.sample.json": sample_records(rng, rm, train_tasks),
        "eval_data/hh_split_llm_valid.golden.json": golden_records(rng, valid[:VALID_GOLDEN]),
        "eval_data/hh_split_llm_valid_llm_v0.sample.json": sample_records(rng, valid[:VALID_GOLDEN], valid_tasks),
        "eval_data/hh_cleaned_origin_test.golden.json": golden_records(rng, test[:TEST_GOLDEN]),
        "eval_data/hh_cleaned_origin_test_llm_v0.sample.json": sample_records(rng, test[:TEST_GOLDEN], test_tasks),
    }


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(
        description="Make the synthetic preference data, in the layout of the paper's cleaned HH split.",
        epilog="example:\n  python tools/dev/make_sample_data.py --output_dir data/sample --seed 42",
    )
    parser.add_argument("--output_dir", type=Path, default=REPO_ROOT / "data" / "sample", help="folder to write to")
    parser.add_argument("--seed", type=int, default=42, help="the committed files are those of seed 42")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Writes every file below `--output_dir`."""
    args = parse_args()
    files = make_sample_data(args.seed)
    for name, records in files.items():
        write_json(args.output_dir / name, records)
    print(f"{sum(len(records) for records in files.values())} records in {len(files)} files under {args.output_dir}")


if __name__ == "__main__":
    main()
