"""How a recipe ends."""

from tests.running import run


def test_a_process_group_ends_without_taking_the_interpreter_apart(tmp_path, monkeypatch):
    """gloo's threads may still hold tensors then, and abort the process; what is registered with atexit still runs."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "run.py"
    script.write_text(
        """
import atexit, torch
from llm_recipes.errors import entrypoint

class Witness:
    def __del__(self):
        print("taken apart", flush=True)

witness = Witness()
atexit.register(print, "goodbye")

@entrypoint
def main():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    print("trained")

main()
print("after main")
"""
    )
    done = run(script=script)
    assert done.code == 0 and done.out == "trained\ngoodbye\n", (done.out, done.err)
