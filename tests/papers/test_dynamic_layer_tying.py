import torch

from headwise.compress.structure.sharing import tied_to
from headwise.papers.depth import dynamic_layer_tying as paper

torch.set_num_threads(1)


def test_it_begins_with_one_layer_and_says_what_is_shared():
    model = paper.fresh(0)
    whole = sum(p.numel() for p in model.parameters())
    tied = paper.train_tied(model, paper.task(), steps=3)
    assert tied.roots == (0,) * 6
    assert sum(p.numel() for p in model.parameters()) < 0.4 * whole
    assert len(tied.losses) == 3


def test_roots_are_what_the_model_holds():
    model = paper.fresh(1)
    tied = paper.train_tied(model, paper.task(), steps=12, every=4, seed=1)
    assert tied.roots == tied_to(model)
    assert len(tied.layers) == 2
    assert all(0 <= root <= place for place, root in enumerate(tied.roots))


def test_untying_leaves_the_answer():
    model = paper.fresh(0)
    paper.tie(model, (0,) * 6)
    given = paper.task().batch(0, 2).inputs
    with torch.no_grad():
        before = model(**given)
        paper.tie_by_copies(model, (0,) * 6)
        assert torch.equal(model(**given), before)
    assert tied_to(model) == tuple(range(6))


def test_the_agent_learns_which_choice_pays():
    torch.manual_seed(0)
    agent = paper.Agent(3)
    learner = torch.optim.Adam(agent.parameters(), lr=1e-2)
    for step in range(300):
        action = step % 3
        paper._learn(agent, learner, [([0, 0, 0], 2, action)], [0, 0, action], float(action == 1))
    random = torch.Generator().manual_seed(0)
    assert agent.choose([0, 0, 0], 2, 0.0, random) == 1
    assert float(agent([0, 0, 0], 2)[1].detach()) > 0.8
