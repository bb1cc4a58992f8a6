import java.net.*;

/** Dial ADDRESS PORT: connects once and prints the error. */
public class Dial {
    public static void main(String[] arguments) {
        try (Socket socket = new Socket()) {
            socket.connect(new InetSocketAddress(arguments[0], Integer.parseInt(arguments[1])), 5000);
            System.out.println("connected");
        } catch (Exception error) {
            System.out.println(error.getMessage());
            System.exit(1);
        }
    }
}
