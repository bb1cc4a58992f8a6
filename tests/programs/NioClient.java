import java.net.*;
import java.nio.*;
import java.nio.channels.*;
import java.nio.charset.StandardCharsets;
import java.util.*;

/** Selector registered before connect: the JVM's usual order. NioClient ADDRESS PORT COUNT */
public class NioClient {
    public static void main(String[] arguments) throws Exception {
        Selector selector = Selector.open();
        InetSocketAddress peer = new InetSocketAddress(arguments[0], Integer.parseInt(arguments[1]));
        int count = Integer.parseInt(arguments[2]), connected = 0, done = 0;
        for (int i = 0; i < count; i++) {
            SocketChannel channel = SocketChannel.open();
            channel.configureBlocking(false);
            channel.register(selector, SelectionKey.OP_CONNECT, ByteBuffer.allocate(64));
            channel.connect(peer);
        }
        long end = System.currentTimeMillis() + 20000;
        while (done < count && System.currentTimeMillis() < end) {
            selector.select(1000);
            Iterator<SelectionKey> keys = selector.selectedKeys().iterator();
            while (keys.hasNext()) {
                SelectionKey key = keys.next();
                keys.remove();
                SocketChannel channel = (SocketChannel) key.channel();
                if (key.isConnectable() && channel.finishConnect()) {
                    connected++;
                    channel.setOption(StandardSocketOptions.TCP_NODELAY, true);
                    channel.write(ByteBuffer.wrap("ehello nio".getBytes(StandardCharsets.UTF_8)));
                    key.interestOps(SelectionKey.OP_READ);
                } else if (key.isReadable()) {
                    ByteBuffer buffer = (ByteBuffer) key.attachment();
                    channel.read(buffer);
                    if (buffer.position() == 9) {
                        done++;
                        channel.close();
                    }
                }
            }
        }
        System.out.println("connected " + connected + " done " + done);
        SocketChannel refused = SocketChannel.open();
        refused.configureBlocking(false);
        refused.register(selector, SelectionKey.OP_CONNECT);
        try {
            refused.connect(new InetSocketAddress(arguments[0], 9));
            selector.select(5000);
            refused.finishConnect();
            System.out.println("not refused");
        } catch (ConnectException error) {
            System.out.println(error.getMessage());
        }
        ServerSocketChannel server = ServerSocketChannel.open();
        server.configureBlocking(false);
        server.register(selector, SelectionKey.OP_ACCEPT);
        server.bind(new InetSocketAddress("127.0.0.1", 0));
        SocketChannel inside = SocketChannel.open(server.getLocalAddress());
        refused.close();
        selector.select(5000);
        SocketChannel accepted = server.accept();
        System.out.println("inside " + (accepted != null && accepted.getRemoteAddress().equals(inside.getLocalAddress())));
        System.out.println(new String(new URL("http://origin.test/hello").openStream().readAllBytes()).trim());
        try (Socket blocking = new Socket()) {
            blocking.connect(new InetSocketAddress("10.77.0.99", 80), 300);
        } catch (SocketTimeoutException error) {
            System.out.println(error.getMessage());
        }
    }
}
