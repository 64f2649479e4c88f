//! An HTTP/1.1 connection that its request drives.
//!
//! hyper wants each connection to be polled by a task. While a request is on the connection, that task is only in the
//! way: it is woken to write the request, and when the response arrives it does nothing but wake the request's own
//! task. Of ten requests that come at once, all ten would be read before the first was written. So [`Http1Driver`]
//! hands the connection to the task of the request, from the moment at which the request is sent until the response is
//! complete. Between requests the connection has a task of its own ([`Http1Driver::run`]), which notices that the
//! server closes it.
//!
//! Whoever drives the connection now is woken: the connection itself only knows one waker, which never changes, so that
//! nothing has to be registered anew.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker, ready};

use super::lock;

/// A connection of hyper's. It ends when the connection is closed.
pub(super) type ConnectionFuture = Box<dyn Future<Output = Result<(), hyper::Error>> + Send + Unpin>;

/// Drives one connection. When it is dropped, the connection's own task goes on.
pub(super) struct Http1Driver {
    connection: Arc<Mutex<Option<ConnectionFuture>>>,
    turn: Arc<Turn>,
    /// The connection's waker.
    waker: Waker,
    /// The waker of what a request waits for.
    delivery: Waker,
}

/// Whose turn it is to drive the connection.
#[derive(Debug, Default)]
struct Turn(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The connection's own task.
    own: Option<Waker>,
    /// Whether a request drives the connection.
    is_lent: bool,
    /// The task of that request.
    request: Option<Waker>,
    /// Whether that task is polling just now, and will look by itself.
    is_polling: bool,
    /// Whether the connection was woken and not polled since.
    is_woken: bool,
    /// Whether it delivered something since the request last looked.
    is_delivered: bool,
}

impl Wake for Turn {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut state = lock(&self.0);
        state.is_woken = true;
        state.tell_unless_polling();
    }
}

/// Is woken when the connection delivers something.
#[derive(Debug)]
struct Delivery(Arc<Turn>);

impl Wake for Delivery {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut state = lock(&self.0.0);
        state.is_delivered = true;
        state.tell_unless_polling();
    }
}

impl State {
    fn tell_unless_polling(&self) {
        if !self.is_polling {
            self.tell();
        }
    }

    /// Wakes whoever drives the connection.
    fn tell(&self) {
        let task = if self.is_lent { &self.request } else { &self.own };
        if let Some(task) = task {
            task.wake_by_ref();
        }
    }
}

impl Http1Driver {
    pub(super) fn new(connection: ConnectionFuture) -> Self {
        let turn = Arc::<Turn>::default();
        // Whoever comes first has to poll it.
        lock(&turn.0).is_woken = true;
        let delivery = Arc::new(Delivery(turn.clone())).into();
        Self { connection: Arc::new(Mutex::new(Some(connection))), waker: turn.clone().into(), delivery, turn }
    }

    /// What the connection's own task does. It ends when the connection has.
    pub(super) fn run(&self) -> impl Future<Output = ()> + Send + use<> {
        OwnTask { connection: self.connection.clone(), turn: self.turn.clone(), waker: self.waker.clone() }
    }

    /// From now on a request drives the connection, with [`poll`](Self::poll).
    pub(super) fn lend(&self) {
        lock(&self.turn.0).is_lent = true;
    }

    /// Polls `wanted`, which waits for something that the connection delivers. Drives the connection for it, unless its
    /// own task does. `wanted` keeps what was delivered, because returning it would move it several times.
    pub(super) fn poll(&self, cx: &mut Context<'_>, mut wanted: impl FnMut(&mut Context<'_>) -> Poll<()>) -> Poll<()> {
        let is_woken = {
            let mut state = lock(&self.turn.0);
            if !state.is_lent {
                drop(state);
                return wanted(cx);
            }
            state.is_polling = true;
            remember(&mut state.request, cx.waker());
            state.is_delivered = false;
            std::mem::take(&mut state.is_woken)
        };
        // Where the connection pauses by itself, it lets others come first.
        let mut pauses = is_woken && self.drive();
        let cx = &mut Context::from_waker(&self.delivery);
        let mut polled = wanted(cx);
        if polled.is_pending() && std::mem::take(&mut lock(&self.turn.0).is_woken) {
            pauses |= self.drive();
            polled = wanted(cx);
        }
        let mut state = lock(&self.turn.0);
        state.is_polling = false;
        state.is_woken |= pauses;
        if (state.is_woken || state.is_delivered) && polled.is_pending() {
            state.tell();
        }
        polled
    }

    /// Polls the connection. Returns whether it woke itself.
    fn drive(&self) -> bool {
        let polled = poll_connection(&mut lock(&self.connection), &self.waker);
        let mut state = lock(&self.turn.0);
        if polled.is_ready() {
            state.own.iter().for_each(Waker::wake_by_ref);
        }
        state.is_delivered = false;
        std::mem::take(&mut state.is_woken)
    }

    /// The request needs the connection no more, or something else before the response is complete: the connection's
    /// own task drives it.
    pub(super) fn give_back(&self) {
        let is_woken = {
            let mut state = lock(&self.turn.0);
            state.is_polling = true;
            std::mem::take(&mut state.is_woken)
        };
        // hyper wakes a connection once in vain after each response. To poll it here costs less than its task.
        let again = is_woken && self.drive();
        self.hand_over(again);
    }

    /// Leaves the connection to its own task, which has to poll it if `is_woken`.
    fn hand_over(&self, is_woken: bool) {
        let mut state = lock(&self.turn.0);
        (state.is_lent, state.is_polling, state.request) = (false, false, None);
        state.is_woken |= is_woken;
        if state.is_woken {
            state.tell();
        }
    }
}

impl Drop for Http1Driver {
    fn drop(&mut self) {
        self.hand_over(false);
    }
}

impl std::fmt::Debug for Http1Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Http1Driver({:?})", self.turn)
    }
}

/// Keeps `waker` in `place`.
fn remember(place: &mut Option<Waker>, waker: &Waker) {
    if !place.as_ref().is_some_and(|known| known.will_wake(waker)) {
        *place = Some(waker.clone());
    }
}

/// Polls the connection, and drops it when it has ended.
fn poll_connection(place: &mut Option<ConnectionFuture>, waker: &Waker) -> Poll<()> {
    let Some(connection) = place else { return Poll::Ready(()) };
    let ended = ready!(Pin::new(connection).poll(&mut Context::from_waker(waker)));
    // A request on the connection gets its error.
    if let Err(error) = ended {
        tracing::trace!(%error, "connection to Amazon ended");
    }
    *place = None;
    Poll::Ready(())
}

/// The connection's own task.
struct OwnTask {
    connection: Arc<Mutex<Option<ConnectionFuture>>>,
    turn: Arc<Turn>,
    waker: Waker,
}

impl Future for OwnTask {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut connection = lock(&self.connection);
        {
            let mut state = lock(&self.turn.0);
            remember(&mut state.own, cx.waker());
            if state.is_lent && connection.is_some() {
                return Poll::Pending;
            }
            state.is_woken = false;
        }
        poll_connection(&mut connection, &self.waker)
    }
}

impl Drop for OwnTask {
    fn drop(&mut self) {
        // Without its task nobody would close an idle connection.
        *lock(&self.connection) = None;
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::time::Duration;

    use futures_util::task::{ArcWake, AtomicWaker, waker};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    /// Counts how often a task was woken.
    #[derive(Default)]
    struct Task(AtomicUsize);

    impl ArcWake for Task {
        fn wake_by_ref(this: &Arc<Self>) {
            this.0.fetch_add(1, SeqCst);
        }
    }

    impl Task {
        /// Polls with the waker of this task.
        fn poll<T>(self: &Arc<Self>, poll: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
            poll(&mut Context::from_waker(&waker(self.clone())))
        }

        /// How often it was woken since the last call.
        fn woken(&self) -> usize {
            self.0.swap(0, SeqCst)
        }
    }

    /// What a connection has delivered.
    #[derive(Default)]
    struct Delivered(AtomicUsize, AtomicWaker);

    impl Delivered {
        fn count(&self) -> usize {
            self.0.load(SeqCst)
        }

        /// Ready once there are `wanted` in all.
        fn poll(&self, cx: &mut Context<'_>, wanted: usize) -> Poll<()> {
            self.1.register(cx.waker());
            if self.count() >= wanted { Poll::Ready(()) } else { Poll::Pending }
        }
    }

    /// A connection that delivers what it receives, and ends when nobody can send any more.
    fn connection(mut receives: UnboundedReceiver<()>) -> (Http1Driver, Arc<Delivered>) {
        let delivered = Arc::<Delivered>::default();
        let delivers = delivered.clone();
        let connection = poll_fn(move |cx| {
            while ready!(receives.poll_recv(cx)).is_some() {
                delivers.0.fetch_add(1, SeqCst);
                delivers.1.wake();
            }
            Poll::Ready(Ok(()))
        });
        (Http1Driver::new(Box::new(connection)), delivered)
    }

    #[test]
    fn the_request_drives_the_connection_and_its_own_task_does_before_and_after() {
        let (send, receives) = unbounded_channel();
        let (driver, delivered) = connection(receives);
        let (own, request) = (Arc::<Task>::default(), Arc::<Task>::default());
        let mut run = Box::pin(driver.run());
        assert!(own.poll(|cx| run.as_mut().poll(cx)).is_pending());
        send.send(()).unwrap();
        assert_eq!((own.woken(), delivered.count()), (1, 0));
        assert!(own.poll(|cx| run.as_mut().poll(cx)).is_pending());
        assert_eq!(delivered.count(), 1);

        driver.lend();
        // A request may move to another task.
        let before = Arc::<Task>::default();
        for task in [&before, &request] {
            assert!(task.poll(|cx| driver.poll(cx, |cx| delivered.poll(cx, 2))).is_pending());
        }
        send.send(()).unwrap();
        assert_eq!((own.woken(), before.woken(), request.woken()), (0, 0, 1));
        assert!(own.poll(|cx| run.as_mut().poll(cx)).is_pending());
        assert_eq!(delivered.count(), 1, "its own task leaves it alone");
        assert!(request.poll(|cx| driver.poll(cx, |cx| delivered.poll(cx, 2))).is_ready());
        assert_eq!(request.woken(), 0, "it sees by itself what the connection delivers to it");

        driver.give_back();
        send.send(()).unwrap();
        assert_eq!((own.woken(), request.woken()), (1, 0));
        assert!(own.poll(|cx| run.as_mut().poll(cx)).is_pending());
        assert_eq!(delivered.count(), 3);
    }

    #[test]
    fn a_request_that_makes_the_connection_go_on_needs_no_second_turn() {
        let (send, receives) = unbounded_channel();
        let (driver, delivered) = connection(receives);
        let request = Arc::<Task>::default();
        driver.lend();
        let mut asked = false;
        let polled = request.poll(|cx| {
            driver.poll(cx, |cx| {
                let polled = delivered.poll(cx, 1);
                if !std::mem::replace(&mut asked, true) {
                    send.send(()).unwrap();
                }
                polled
            })
        });
        assert_eq!((polled, request.woken()), (Poll::Ready(()), 0));
    }

    #[test]
    fn what_another_thread_delivers_while_the_request_looks_wakes_the_request() {
        let (_send, receives) = unbounded_channel();
        let (driver, _) = connection(receives);
        let request = Arc::<Task>::default();
        driver.lend();
        let delivered_too_late = |cx: &mut Context<'_>| {
            cx.waker().wake_by_ref();
            Poll::Pending
        };
        assert!(request.poll(|cx| driver.poll(cx, delivered_too_late)).is_pending());
        assert_eq!(request.woken(), 1);
    }

    #[test]
    fn a_connection_that_pauses_by_itself_lets_others_come_first() {
        let mut paused = false;
        let connection = poll_fn(move |cx| {
            if !std::mem::replace(&mut paused, true) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(Ok(()))
        });
        let driver = Http1Driver::new(Box::new(connection));
        let (own, request) = (Arc::<Task>::default(), Arc::<Task>::default());
        let mut run = Box::pin(driver.run());
        driver.lend();
        assert!(own.poll(|cx| run.as_mut().poll(cx)).is_pending());
        let never = |_: &mut Context<'_>| Poll::Pending;
        assert!(request.poll(|cx| driver.poll(cx, never)).is_pending());
        assert_eq!((request.woken(), own.woken()), (1, 0));
        assert!(request.poll(|cx| driver.poll(cx, never)).is_pending());
        assert_eq!(own.woken(), 1, "it has ended");
        assert!(own.poll(|cx| run.as_mut().poll(cx)).is_ready());
    }

    #[test]
    fn after_a_request_that_is_dropped_the_own_task_goes_on() {
        let (send, receives) = unbounded_channel();
        let (driver, _) = connection(receives);
        let own = Arc::<Task>::default();
        let mut run = Box::pin(driver.run());
        driver.lend();
        assert!(own.poll(|cx| run.as_mut().poll(cx)).is_pending());
        assert!(own.poll(|cx| driver.poll(cx, |_| Poll::Pending)).is_pending());
        own.woken();
        drop((send, driver));
        assert_eq!(own.woken(), 2, "once as the task of the request");
        assert!(own.poll(|cx| run.as_mut().poll(cx)).is_ready());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_wake_is_lost_between_threads() {
        let (send, receives) = unbounded_channel();
        let (driver, delivered) = connection(receives);
        tokio::spawn(driver.run());
        let (ask, mut asked) = unbounded_channel::<()>();
        let server = std::thread::spawn(move || {
            while asked.blocking_recv().is_some() {
                send.send(()).unwrap();
            }
        });
        let exchanges = async {
            for exchange in 1..=20_000 {
                driver.lend();
                ask.send(()).unwrap();
                poll_fn(|cx| driver.poll(cx, |cx| delivered.poll(cx, 2 * exchange - 1))).await;
                driver.give_back();
                ask.send(()).unwrap();
                poll_fn(|cx| delivered.poll(cx, 2 * exchange)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), exchanges).await.expect("a wake was lost");
        drop(ask);
        server.join().unwrap();
    }
}
