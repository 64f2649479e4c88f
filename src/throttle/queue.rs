//! The calls that wait in one bucket: first in, first out for each account, and round robin between the accounts.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;

/// Abandoned entries beyond the waiting ones that are kept before the queue is swept.
const SLACK: usize = 64;

/// The waiting calls. A call that gives up drops its receiver; its entry is skipped, or swept later.
#[derive(Debug)]
pub(super) struct Queue<T> {
    /// Each account's calls; never empty.
    calls: HashMap<Arc<str>, VecDeque<oneshot::Sender<T>>>,
    /// The accounts with calls, the next one first.
    turns: VecDeque<Arc<str>>,
    /// Entries, abandoned ones included.
    entries: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { calls: HashMap::new(), turns: VecDeque::new(), entries: 0 }
    }
}

impl<T> Queue<T> {
    /// Adds a call of `account`; `first` puts it before the account's other calls, because it had its turn already.
    pub(super) fn push(&mut self, account: &str, first: bool) -> oneshot::Receiver<T> {
        let (sender, receiver) = oneshot::channel();
        if !self.calls.contains_key(account) {
            let account = Arc::<str>::from(account);
            if first {
                self.turns.push_front(account.clone());
            } else {
                self.turns.push_back(account.clone());
            }
            self.calls.insert(account, VecDeque::new());
        }
        if let Some(calls) = self.calls.get_mut(account) {
            if first {
                calls.push_front(sender);
            } else {
                calls.push_back(sender);
            }
            self.entries += 1;
        }
        receiver
    }

    /// Removes the call whose turn it is. The next turn is another account's, if another one waits.
    pub(super) fn pop(&mut self) -> Option<oneshot::Sender<T>> {
        loop {
            let account = self.turns.pop_front()?;
            let Some(calls) = self.calls.get_mut(&account) else { continue };
            let mut call = None;
            while let Some(next) = calls.pop_front() {
                self.entries -= 1;
                if !next.is_closed() {
                    call = Some(next);
                    break;
                }
            }
            if calls.is_empty() {
                self.calls.remove(&account);
            } else {
                self.turns.push_back(account);
            }
            if call.is_some() {
                return call;
            }
        }
    }

    /// Whether no call waits; abandoned entries are swept.
    pub(super) fn is_empty(&mut self) -> bool {
        if self.entries > 0 && self.calls.values().flatten().all(oneshot::Sender::is_closed) {
            *self = Self::default();
        }
        self.entries == 0
    }

    /// Sweeps abandoned entries if there are many beside the `waiting` calls.
    pub(super) fn sweep(&mut self, waiting: usize) {
        if self.entries <= 2 * waiting + SLACK {
            return;
        }
        self.calls.retain(|_, calls| {
            calls.retain(|call| !call.is_closed());
            !calls.is_empty()
        });
        self.turns.retain(|account| self.calls.contains_key(account));
        self.entries = self.calls.values().map(VecDeque::len).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends its number to each call in turn, and returns which call got which turn.
    fn turns(queue: &mut Queue<usize>, mut calls: Vec<(&'static str, oneshot::Receiver<usize>)>) -> Vec<&'static str> {
        let mut turn = 0;
        while let Some(call) = queue.pop() {
            call.send(turn).unwrap();
            turn += 1;
        }
        let mut order: Vec<_> =
            calls.iter_mut().filter_map(|(name, call)| Some((call.try_recv().ok()?, *name))).collect();
        order.sort_unstable();
        order.into_iter().map(|(_, name)| name).collect()
    }

    #[test]
    fn accounts_take_turns_however_many_calls_one_of_them_has() {
        let mut queue = Queue::default();
        let mut calls: Vec<_> = ["a1", "a2", "a3", "a4"].map(|name| (name, queue.push("a", false))).into();
        calls.push(("b1", queue.push("b", false)));
        calls.push(("c1", queue.push("c", false)));
        calls.push(("b2", queue.push("b", false)));
        assert_eq!(turns(&mut queue, calls), ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]);
        assert!(queue.is_empty());
    }

    #[test]
    fn nobody_starves_behind_an_account_whose_calls_come_back() {
        let mut queue = Queue::<usize>::default();
        let mut busy: Vec<_> = (0..1000).map(|_| queue.push("busy", false)).collect();
        let mut quiet = queue.push("quiet", false);
        // Amazon refuses each call of the busy account, so each comes back before the others of its account.
        for turn in 0..3 {
            queue.pop().unwrap().send(turn).unwrap();
            if quiet.try_recv().is_ok() {
                assert!(turn <= 1, "turn {turn}");
                return;
            }
            busy.push(queue.push("busy", true));
        }
        panic!("the quiet account gets no turn");
    }

    #[test]
    fn a_call_that_had_its_turn_comes_first() {
        let mut queue = Queue::default();
        let calls = vec![
            ("a1", queue.push("a", false)),
            ("b1", queue.push("b", false)),
            ("b0", queue.push("b", true)),
            ("c0", queue.push("c", true)),
        ];
        assert_eq!(turns(&mut queue, calls), ["c0", "a1", "b0", "b1"]);
    }

    #[test]
    fn a_call_that_gave_up_takes_nobodys_turn_and_no_memory() {
        let mut queue = Queue::default();
        let abandoned = queue.push("a", false);
        let calls = vec![("a2", queue.push("a", false)), ("b1", queue.push("b", false))];
        drop(abandoned);
        assert!(!queue.is_empty());
        assert_eq!(turns(&mut queue, calls), ["a2", "b1"]);
        for _ in 0..10_000 {
            drop(queue.push("a", false));
            queue.sweep(0);
        }
        assert!(queue.entries <= SLACK + 1, "{}", queue.entries);
        assert!(queue.is_empty() && queue.calls.is_empty());
    }
}
