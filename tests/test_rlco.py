from types import SimpleNamespace

import pytest
import torch

import train_rlco
from checkpoints import UserError
from machines import AdamW
from policy import index_obs, load_policy

STATS = {
    "observation.state": {"q01": [-1.0] * 7, "q99": [1.0] * 7},
    "action": {"q01": [-0.02] * 6 + [-1.0], "q99": [0.02] * 6 + [-1.0]},
}
ARGS = SimpleNamespace(clip=0.2, value_clip=0.2, huber_delta=10.0, value_coef=0.5, entropy_coef=0.01, beta=0.7)


def slow_gae(reward, value, last_value, truncated_value, terminated, truncated, gamma, gae_lambda):
    """The definition: a discounted sum of TD errors, up to the end of the episode."""
    T, B = reward.shape
    advantage = torch.zeros(T, B)
    for b in range(B):
        for t in range(T):
            weight = 1.0
            for s in range(t, T):
                after = value[s + 1, b].item() if s + 1 < T else last_value[b].item()
                if terminated[s, b]:
                    after = 0.0
                if truncated[s, b]:
                    after = truncated_value[s, b].item()
                advantage[t, b] += weight * (reward[s, b].item() + gamma * after - value[s, b].item())
                if terminated[s, b] or truncated[s, b]:
                    break
                weight *= gamma * gae_lambda
    return advantage


def test_gae_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    reward, value, truncated_value = torch.randn(3, 12, 5, generator=generator)
    last_value = torch.randn(5, generator=generator)
    terminated = torch.rand(12, 5, generator=generator) < 0.15
    truncated = (torch.rand(12, 5, generator=generator) < 0.15) & ~terminated
    assert terminated[1:-1].any() and truncated[1:-1].any()  # both kinds of end inside the rollout
    rollout = reward, value, last_value, truncated_value, terminated, truncated, 0.9, 0.8
    advantage, returns = train_rlco.gae(*rollout)
    torch.testing.assert_close(advantage, slow_gae(*rollout))
    torch.testing.assert_close(returns, advantage + value)


@pytest.fixture(params=["tiny-pi05", "tiny-openvla"])
def policy(request):
    torch.manual_seed(0)
    policy = load_policy(request.param, stats=STATS)
    for p in policy.parameters():  # away from the zeros of the initialisation, which hide mistakes
        p.data += 0.01 * torch.randn_like(p)
    return policy


def make_rollout(policy, n=6):
    obs = dict(
        image=torch.randint(0, 256, (n, 64, 64, 3), dtype=torch.uint8),
        state=torch.rand(n, 7) - 0.5,
        prompt=["push the cube to the target"] * n,
    )
    decision = policy.act(obs, sample=True)
    rollout = dict(
        obs=obs,
        latent=decision.latent,
        logprob=decision.logprob,
        value=decision.value,
        advantage=torch.randn(n),
        returns=torch.randn(n),
    )
    real = dict(
        obs, action=torch.rand(n, policy.horizon, 7) * 0.02, action_is_pad=torch.zeros(n, policy.horizon).bool()
    )
    return rollout, real


def test_nothing_has_changed_right_after_acting(policy):
    rollout, _ = make_rollout(policy)
    _, parts = train_rlco.rlco_loss(policy, rollout, None, ARGS)
    assert parts["clip_fraction"] == 0 and abs(parts["approx_kl"].item()) < 1e-6
    torch.testing.assert_close(parts["policy"], -rollout["advantage"].mean(), atol=1e-5, rtol=0)  # every ratio is 1
    expected = 0.5 * (rollout["value"] - rollout["returns"]).square().mean()
    torch.testing.assert_close(parts["value"], expected, atol=1e-5, rtol=0)


def test_the_loss_is_made_of_its_parts_with_their_signs(policy):
    """And the value loss is clipped PPO's: the larger Huber error of the value and of one that moved by 0.2 at most."""
    rollout, real = make_rollout(policy)
    value = rollout["value"]
    rollout["value"] = value - torch.tensor([0.5, -0.5, 0.5, -0.5, 0.1, -0.1])  # when the policy acted
    rollout["returns"] = value + torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])
    args = SimpleNamespace(**{**vars(ARGS), "huber_delta": 1.1})
    loss, parts = train_rlco.rlco_loss(policy, rollout, real, args)
    # errors: 1, 1, 1, 1, 1, 1 unclipped; of the value at 0.2 from where it was 1.3, 0.7, 0.7, 1.3, 1, 1
    far, near = 1.1 * (1.3 - 1.1 / 2), 1 / 2  # linear beyond delta, square below
    expected = torch.tensor([far, near, near, far, near, near]).mean()
    torch.testing.assert_close(parts["value"], expected, atol=1e-5, rtol=0)
    ppo = parts["policy"] + 0.5 * parts["value"] - 0.01 * parts["entropy"]
    torch.testing.assert_close(parts["ppo"], ppo)
    torch.testing.assert_close(loss, ppo + 0.7 * parts["anchor"])


def gradient(policy, loss):
    policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def test_the_gradient_with_beta_is_the_sum_of_its_parts(policy):
    rollout, real = make_rollout(policy)

    def total(beta):
        torch.manual_seed(1)  # the flow times and noise of the imitation loss
        return train_rlco.rlco_loss(policy, rollout, real, SimpleNamespace(**{**vars(ARGS), "beta": beta}))

    both = gradient(policy, total(0.7)[0])
    ppo = gradient(policy, total(0.0)[0])
    torch.manual_seed(1)
    assert ppo.shape == both.shape
    anchor = gradient(policy, policy.sft_loss(real) + 0 * sum(p.sum() for p in policy.parameters() if p.requires_grad))
    assert anchor.norm() > 1e-3 and ppo.norm() > 1e-3
    torch.testing.assert_close(both, ppo + 0.7 * anchor, atol=1e-5, rtol=1e-4)


def test_more_backward_passes_give_the_same_gradient(policy):
    """Two decisions of four worlds in one micro-batch, or worlds 0 and 2 in one and 1 and 3 in another; which act
    together or do not."""
    made = [make_rollout(policy, n=4)[0] for _ in range(2)]
    columns = {key: torch.stack([one[key] for one in made]) for key in ("logprob", "value", "returns", "advantage")}
    args = {**vars(ARGS), "beta": 0, "seed": 1, "critic_warmup": 0, "update_epochs": 1, "minibatch_size": 8}
    args |= dict(target_kl=9, max_grad_norm=1e9, desired_kl=None, out="")
    norms = []
    for accumulate, groups in ((1, 1), (2, 2), (2, 1)):
        rows = [slice(k, None, groups) for k in range(groups)]
        obs = [[index_obs(one["obs"], group) for one in made] for group in rows]
        latent = [torch.cat([one["latent"][group] for one in made]) for group in rows]
        optimizer = AdamW([dict(params=[p for p in policy.parameters() if p.requires_grad], lr=0.0)])
        experience = dict(columns, obs=obs, latent=latent)
        ways = SimpleNamespace(**args, accumulate=accumulate, acting_groups=groups)
        norms.append(train_rlco.update(policy, optimizer, experience, None, 0, 0, ways)["loss/grad_norm"])
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-3) and norms[0] > 1e-3


def test_clipping_stops_the_gradient_of_a_ratio_that_went_too_far(policy):
    rollout, _ = make_rollout(policy)
    args = SimpleNamespace(**{**vars(ARGS), "entropy_coef": 0.0, "value_coef": 0.0})
    far = dict(rollout, logprob=rollout["logprob"] - 1.0, advantage=torch.ones(6))  # ratio e, to be raised further
    loss, parts = train_rlco.rlco_loss(policy, far, None, args)
    assert parts["clip_fraction"] == 1
    assert gradient(policy, loss).abs().max() == 0
    back = dict(far, advantage=-torch.ones(6))  # to be lowered: not clipped
    assert gradient(policy, train_rlco.rlco_loss(policy, back, None, args)[0]).abs().max() > 0


def test_a_run_that_will_not_come_back_is_stopped():
    def logs(success, explained):
        rows = zip(success, explained)
        return [{"rollout/success": s, "rollout/explained_variance": e} for s, e in rows] + [{"eval/success_twin": 0}]

    args = train_rlco.Args()
    train_rlco.stop_if_diverged(logs([0] * 9, [-9, -40, -40, 0.1] * 2), args)  # never began, came back
    train_rlco.stop_if_diverged(logs([0.2, 0, 0, 0], [0] * 4), args)
    with pytest.raises(UserError, match="iteration 4: the policy collapsed"):
        train_rlco.stop_if_diverged(logs([0.2, 0, 0, 0, 0], [0] * 5), args)
    with pytest.raises(UserError, match="iteration 2: the critic ran away: rollout/explained_variance is -40"):
        train_rlco.stop_if_diverged(logs([0.2, 0.2, 0.2], [-11, -20, -40]), args)


def test_the_learning_rate_is_steered_towards_the_desired_kl_within_limits():
    args = SimpleNamespace(lr=2e-5, desired_kl=0.006)
    assert train_rlco.steered_lr(2e-5, 0.006, args) == 2e-5
    assert train_rlco.steered_lr(2e-5, 0.001, args) == pytest.approx(3e-5)
    assert train_rlco.steered_lr(2e-5, 0.05, args) == pytest.approx(2e-5 / 1.5)
    lr = 2e-5
    for _ in range(20):
        lr = train_rlco.steered_lr(lr, 0.0, args)
    assert lr == pytest.approx(2e-4)
    for _ in range(20):
        lr = train_rlco.steered_lr(lr, 1.0, args)
    assert lr == pytest.approx(2e-6)
