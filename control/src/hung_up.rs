//! The end of a connection, told to others than who reads from it.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::{Sink, Stream, TryStream};
use tokio::sync::oneshot;

/// A transport that tells once that its peer has hung up.
pub(crate) struct UntilHungUp<T> {
    transport: T,
    tell: Option<oneshot::Sender<()>>,
}

impl<T> UntilHungUp<T> {
    /// The transport, and what resolves when there is nothing more to be read from it.
    pub(crate) fn new(transport: T) -> (Self, oneshot::Receiver<()>) {
        let (tell, hung_up) = oneshot::channel();
        let tell = Some(tell);
        (Self { transport, tell }, hung_up)
    }
}

impl<T: TryStream + Unpin> Stream for UntilHungUp<T> {
    type Item = Result<T::Ok, T::Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let item = ready!(Pin::new(&mut this.transport).try_poll_next(context));
        // After an error nobody reads on.
        if !matches!(item, Some(Ok(_)))
            && let Some(tell) = this.tell.take()
        {
            // Nobody who has gone away need know.
            let _ = tell.send(());
        }
        Poll::Ready(item)
    }
}

impl<T: Sink<Item> + Unpin, Item> Sink<Item> for UntilHungUp<T> {
    type Error = T::Error;

    fn poll_ready(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Self::Error>> {
        Pin::new(&mut self.get_mut().transport).poll_ready(context)
    }

    fn start_send(self: Pin<&mut Self>, item: Item) -> Result<(), Self::Error> {
        Pin::new(&mut self.get_mut().transport).start_send(item)
    }

    fn poll_flush(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Self::Error>> {
        Pin::new(&mut self.get_mut().transport).poll_flush(context)
    }

    fn poll_close(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), Self::Error>> {
        Pin::new(&mut self.get_mut().transport).poll_close(context)
    }
}
